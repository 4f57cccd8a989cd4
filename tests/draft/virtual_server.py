"""A server in virtual time: the real policy and drafting loop, made-up sequences, and a clock that goes by the tables.

What a choice is worth then does not hang on what else a machine does: the same at each run, in seconds.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_del.draft.clock import Pace
from vllm_del.draft.decide import DynamicPolicy
from vllm_del.draft.head import Head
from vllm_del.draft.loop import NO_TOKEN, DraftRows, Drafts, Forward, Plan, draft
from vllm_del.draft.shadow import ShadowScorer
from vllm_del.draft.verified import Verified
from vllm_del.policy.cost import CostTables, MeasuredCosts
from vllm_del.policy.planner import Planner

CPU = torch.device("cpu")
PROMPT = 32
MOST_ROWS, SLOTS, NO_END = 32, 64, 1 << 20

CLASSES = {"easy": ["easy"], "hard": ["hard"], "mixed": ["easy", "hard", "turning easy", "turning hard"]}
"""Of the sequences of each kind of work; the last two change in the middle."""


@dataclass
class Text:
    """What each exit would say at each position of one sequence; a deeper exit is right where a shallower one is."""

    length: int
    # [positions, exits]: whether it is what the target says, and how probable it is under the exit
    right: np.ndarray
    confidence: np.ndarray


def texts(kind: str, easy: Sequence[float], hard: Sequence[float], number: int, seed: int) -> list[Text]:
    """Of 64 to 192 tokens. `easy` and `hard` are how often each exit is right."""
    rng, made = np.random.default_rng(seed), []
    for name in (CLASSES[kind] * number)[:number]:
        length = int(rng.integers(64, 192))
        positions = PROMPT + length + 64
        second_half = np.arange(positions) > PROMPT + length // 2
        is_easy = {"easy": True, "hard": False, "turning easy": second_half, "turning hard": ~second_half}[name]
        rates = np.where(np.broadcast_to(is_easy, positions)[:, None], easy, hard)
        right = rng.random((positions, 1)) < rates
        # Of what is right mostly high, of the rest anything.
        chance = rng.random(right.shape)
        confidence = np.where(right, 1 - 0.9 * chance**2, 0.1 + 0.8 * chance).astype(np.float32)
        made.append(Text(length, right, confidence))
    return made


@dataclass
class Place:
    """A sequence while it is served."""

    of: Text
    slot: int
    # tokens of it that are known, the prompt's too; those generated; and what was drafted last, and at which exit
    known: int = PROMPT
    drafted: int = 0
    exit: int = 0

    @property
    def generated(self) -> int:
        return self.known - PROMPT

    def verify(self) -> int:
        """How many of its drafts are accepted."""
        begin = self.known - 1
        wrong = np.flatnonzero(~self.of.right[begin : begin + self.drafted, self.exit])
        return int(wrong[0]) if len(wrong) else self.drafted

    def fed(self) -> range:
        """Positions of the tokens that a verification computes: the prompt's at first."""
        return range(self.known - 1, self.known + self.drafted) if self.generated else range(PROMPT)


@dataclass
class VirtualServer:
    """Serves sequences by a policy, or by a fixed pair, and keeps the time."""

    measured: MeasuredCosts
    depths: Sequence[int]
    longest: int
    # what observing and planning take, seconds
    planning: float = 0.0
    seconds: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.costs = CostTables(self.measured, MOST_ROWS, self.longest, CPU)

    def dynamic(self) -> DynamicPolicy:
        """The policy that users get, of the default budget, which knows the costs as they are."""
        head, planner = VirtualHead(self), Planner(torch.tensor(self.depths), self.costs, self.longest)
        shadow = ShadowScorer(lambda states: states, head, head, self.costs, 0.02, CPU)
        policy = DynamicPolicy(
            self.depths, 2 * self.depths[-1], self.longest, SLOTS, shadow, planner, CPU, on_host=True
        )
        policy.pace = VirtualPace(self)
        return policy

    def rate(self, work: list[Text], places: int, policy: DynamicPolicy | tuple[int, int]) -> float:
        """Tokens a second while all places are taken; a fixed policy is an index into the exits and a length."""
        waiting, free, begun, tokens = deque(work), deque(range(SLOTS)), self.seconds, 0
        served: list[Place] = []
        slots = torch.empty(0, dtype=torch.int64)
        while True:
            free += [place.slot for place in served if place.generated >= place.of.length]
            left = [place for place in served if place.generated < place.of.length]
            fresh = [Place(waiting.popleft(), free.popleft()) for _ in range(min(places - len(left), len(waiting)))]
            if len(left) + len(fresh) < places:
                return tokens / (self.seconds - begun)
            if fresh or len(left) < len(served):
                served = left + fresh
                slots = torch.tensor([place.slot for place in served])
            tokens += self._round(served, slots, policy)

    def _round(self, served: list[Place], slots: torch.Tensor, policy: DynamicPolicy | tuple[int, int]) -> int:
        """A verification and the drafts for the next one; the tokens that the first one yields."""
        fed, drafted = [place.fed() for place in served], [place.drafted for place in served]
        fresh = [row for row, place in enumerate(served) if not place.generated]
        accepted, before = [place.verify() for place in served], [place.generated for place in served]
        contexts = sum(place.known for place in served)
        self.seconds += self.costs.verify_seconds(sum(map(len, fed)), contexts)
        for place, kept in zip(served, accepted, strict=True):
            place.known += kept + 1
        limit = [max(0, min(self.longest, place.of.length - place.generated - 1)) for place in served]
        if isinstance(policy, DynamicPolicy):
            policy.observe(slots, _verified(served, fed, fresh, drafted, accepted, contexts))
            lengths, exits, steps = _draft(policy, served, slots, limit)
        else:
            lengths, exits = [min(most, policy[1]) for most in limit], [policy[0]] * len(served)
            steps = [(sum(length > step for length in lengths), policy[0]) for step in range(max(lengths))]
        for rows, exit in steps:
            self.seconds += self.costs.draft_seconds(rows, self.depths[exit], rows * contexts / len(served))
        for place, place_drafted, exit in zip(served, lengths, exits, strict=True):
            place.drafted, place.exit = place_drafted, exit
        return sum(min(place.generated, place.of.length) - done for place, done in zip(served, before, strict=True))


class VirtualPace(Pace):
    """Planning takes the server's time."""

    def __init__(self, server: VirtualServer) -> None:
        super().__init__(server.planning, server.costs, learns=False)
        self.server = server

    def planned(self, seconds: float) -> None:
        self.server.seconds += self.server.planning
        super().planned(seconds)


@dataclass
class VirtualHead(Head):
    """States are what it says: right or not, and the confidence. Its time is the server's."""

    server: VirtualServer

    def __call__(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.server.seconds += self.server.costs.head_seconds(len(states))
        return torch.zeros(len(states), dtype=torch.int64), states[:, 1]

    def agree(self, states: torch.Tensor, expected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return states[:, 0] > 0, self(states)[1]


def _verified(
    served: list[Place], fed: list[range], fresh: list[int], drafted: list[int], accepted: list[int], contexts: int
) -> Verified:
    # [tokens, exits, 2]
    said = [np.stack((p.of.right[list(at)], p.of.confidence[list(at)]), -1) for p, at in zip(served, fed, strict=True)]
    states = torch.tensor(np.concatenate(said), dtype=torch.float32)
    ends, rows = np.cumsum([len(at) for at in fed]), len(served)
    return Verified(
        states=[*states.unbind(1), states[:, -1]],
        input_ids=torch.zeros(len(states), dtype=torch.int64),
        start=torch.tensor(ends - 1) - torch.tensor(drafted),
        drafted=torch.tensor(drafted),
        accepted=torch.tensor(accepted),
        next_token=torch.zeros(rows, dtype=torch.int64),
        sampled=torch.ones(rows, dtype=torch.bool),
        longest=max(drafted),
        num_tokens=len(states),
        contexts=contexts,
        only_decodes=not fresh,
        fresh=fresh,
        ended=[(row, PROMPT - 1) for row in fresh],
        came=len(fresh),
        left=len(fresh),
    )


def _draft(
    policy: DynamicPolicy, served: list[Place], slots: torch.Tensor, limit: list[int]
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """How many tokens each place drafts and at which exit, and the rows and the deepest exit of each step."""
    rows, known, longest = len(served), torch.tensor([place.known for place in served]), policy.max_length
    plan = policy.plan(slots, torch.full((rows,), longest), torch.tensor(limit), known)
    drafts = Drafts(torch.empty(rows, longest, dtype=torch.int64), torch.zeros(rows, longest))
    launched = draft(_forward(served), _rows(known), plan, NO_END, drafts, compact=True)
    policy.record(slots, plan, drafts, launched)
    return (drafts.tokens != NO_TOKEN).sum(1).tolist(), plan.exit.tolist(), launched.steps


def _rows(known: torch.Tensor) -> DraftRows:
    """The first step feeds the last known token. The block table says which row it is, also when others have left."""
    rows = len(known)
    return DraftRows(
        input_ids=torch.zeros(rows, dtype=torch.int32),
        positions=known - 2,
        seq_lens=torch.zeros(rows, dtype=torch.int32),
        live=torch.ones(rows, dtype=torch.bool),
        block_tables=[torch.arange(rows, dtype=torch.int32).unsqueeze(1)],
        block_sizes=[NO_END],
        slots=[torch.zeros(rows, dtype=torch.int64)],
    )


def _forward(served: list[Place]) -> Forward:
    def forward(step: int, rows: DraftRows, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        where = zip(rows.block_tables[0][:, 0].tolist(), rows.positions.tolist(), plan.exit.tolist(), strict=True)
        said = [served[row].of.confidence[position, exit] for row, position, exit in where]
        return torch.zeros(len(said), dtype=torch.int64), torch.tensor(said)

    return forward
