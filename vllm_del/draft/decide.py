"""What a round drafts: always the same (`FixedPolicy`), or what was learnt from the rounds before (`DynamicPolicy`).

A round goes `observe`, `plan`, drafting, `record`. Sequences are known by slots: places that a sequence keeps while it
lives, whatever row of the batch it is in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_del.draft.clock import Late, Pace, Stopwatch
from vllm_del.draft.loop import NO_TOKEN, Drafts, Launched, Plan
from vllm_del.draft.shadow import PROMPT_POSITIONS, ShadowScorer
from vllm_del.draft.tally import Counts, Tally
from vllm_del.draft.upload import upload
from vllm_del.policy.acceptance import AcceptanceStatistics, kept_positions
from vllm_del.policy.objective import best_by_tokens_per_layer
from vllm_del.policy.planner import Planner


@dataclass
class Verified:
    """What a verification did: tensors on the model's device, by row of the batch."""

    # per candidate exit, and at last for the whole model: [tokens, hidden size], hidden state and residual together
    states: Sequence[torch.Tensor]
    # [tokens] int: what was fed
    input_ids: torch.Tensor
    # [rows] int64: where in these the row's last known token is; its drafts follow
    start: torch.Tensor
    # [rows] int64: the drafts verified, and of these the accepted
    drafted: torch.Tensor
    accepted: torch.Tensor
    # [rows] int: the token that the target chose itself, after the accepted drafts
    next_token: torch.Tensor
    # [rows] bool: rows past their prompt; the others sampled nothing that counts
    sampled: torch.Tensor
    # the largest of `drafted`, or a bound on it
    longest: int
    # of the step, prompts included
    num_tokens: int
    # the context lengths of all rows together, or a bound on it
    contexts: int
    # whether every row was past its prompt before
    only_decodes: bool
    # rows of sequences seen for the first time, or again in another slot
    fresh: Sequence[int]
    # of these the rows that ended their prompt in this step, and how many of its positions before the last one count
    ended: Sequence[tuple[int, int]]


@dataclass
class Choice:
    """What is best for some sequences, for as many rounds as it serves: tensors on the model's device."""

    # [rows] int64 each: of whom, after which segment they leave, and how long their drafts are
    slots: torch.Tensor
    exit: torch.Tensor
    length: torch.Tensor
    # [rows, exits] float64: a draft less probable than this is the last one, and what acceptance is expected
    stop_below: torch.Tensor
    acceptance: torch.Tensor


class FixedPolicy:
    """Every row drafts as much as it may, and leaves at the only exit there is."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length

    def plan(self, slots: torch.Tensor, limit: torch.Tensor, context: torch.Tensor) -> Plan:
        never = torch.full(limit.shape, torch.nan, device=limit.device)
        return Plan(torch.zeros_like(limit), limit, never, deepest=0, longest=self.max_length)


class DynamicPolicy:
    """Chooses exit and length by sequence from acceptance, and from measured costs if there is a planner.

    Without one it is the paper's: the exit of the highest tokens per layer, drafts up to the largest length, ended by
    confidence alone.
    """

    def __init__(
        self,
        # candidate exits, ascending
        exits: Sequence[int],
        num_layers: int,
        max_length: int,
        num_slots: int,
        shadow: ShadowScorer,
        planner: Planner | None,
        device: torch.device,
        # whether the host sees the device's values at once, as on a CPU
        on_host: bool,
        # where costs are known
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.statistics = AcceptanceStatistics(num_slots, len(exits), device)
        self._shadow = shadow
        self.planner = planner
        self._on_host = on_host
        self._stopwatch = stopwatch
        if planner and stopwatch:
            planner.correction = stopwatch.correction
        self._num_layers = num_layers
        self.max_length = max_length
        self._depths = torch.tensor(exits, device=device)
        self._each_exit = torch.arange(len(exits), device=device)
        # What was drafted last for each slot: [slots], [slots], [slots, max length]
        self._exit = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._length = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._confidence = torch.zeros(num_slots, max_length, device=device)
        # What was expected of it, and whether it might have been longer than 0: [slots] each
        self._expected = torch.zeros(num_slots, dtype=torch.float64, device=device)
        self._allowed = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self._tally = Tally(len(exits), max_length)
        self._late_counts = Late(first=None)
        # If set, a choice serves several rounds of the same sequences: the one that does, and its age in rounds
        self.pace: Pace | None = None
        self._choice: Choice | None = None
        self._age = 0
        self._bounds = Late((len(exits) - 1, max_length))
        # Whether the last round drafted, as far as the host knows
        self._drafts = True

    def _forget(self, slots: torch.Tensor) -> None:
        self.statistics.reset(slots)
        self._length.index_fill_(0, slots, 0)
        self._allowed.index_fill_(0, slots, False)

    def counts(self) -> Counts | None:
        """What happened since last time, if it is time to tell."""
        if not self._tally.is_due:
            return None
        values = self._tally.flush()
        known = values.tolist() if self._on_host else self._late_counts.exchange(values)[0]
        return self._tally.counts(known) if known else None

    def observe(self, slots: torch.Tensor, verified: Verified) -> None:
        """Learn from a verification."""
        if verified.fresh:
            self._forget(slots[upload(verified.fresh, slots.device)])
        self._count(slots, verified)
        self._shadow.earn(verified.num_tokens, self._drafts)
        self._age += 1
        of_these = self._choice is not None and self._choice.slots is slots and verified.only_decodes
        if of_these and self.pace is not None and self._age < self.pace.rounds(len(slots), self._drafts):
            return
        self._choice = None
        if verified.ended:
            self._observe_prompts(slots, verified)
        steps = torch.arange(verified.longest + 1, device=slots.device)
        accepted = verified.accepted.unsqueeze(1)
        kept = kept_positions(verified.accepted, len(steps)) & verified.sampled.unsqueeze(1)
        # What the exit that drafted said is known: it was verified. [rows, positions, exits]
        drafted = torch.minimum(verified.drafted, self._length[slots]).unsqueeze(1)
        own = (kept & (steps < drafted)).unsqueeze(-1) & (self._exit[slots][:, None, None] == self._each_exit)
        matched = own & (steps < accepted).unsqueeze(-1)
        width = min(verified.longest, self.max_length)
        confidence = torch.zeros(own.shape, device=slots.device)
        confidence[:, :width] = self._confidence[slots, :width].unsqueeze(-1)

        wanted, scored = kept.unsqueeze(-1) & ~own, own
        number = self._shadow.affordable(int(wanted.sum()) if self._on_host else wanted.numel())
        if number:
            places = self._shadow.choose(wanted, number)
            row, rest = places // (wanted.shape[1] * wanted.shape[2]), places % (wanted.shape[1] * wanted.shape[2])
            step, exit = rest // wanted.shape[2], rest % wanted.shape[2]
            # What is not wanted may lie anywhere.
            last = verified.input_ids.shape[0] - 1
            at = (verified.start[row] + step).clamp_max(last)
            accepted_token = verified.input_ids[(at + 1).clamp_max(last)]
            target = torch.where(step < verified.accepted[row], accepted_token, verified.next_token[row])
            token, probability = self._shadow.score(verified.states, at, exit)
            # Where fewer are wanted than were chosen, the rest must not touch what was verified.
            new = wanted.view(-1)[places]
            matched.view(-1)[places] = torch.where(new, token == target, matched.view(-1)[places])
            confidence.view(-1)[places] = torch.where(new, probability, confidence.view(-1)[places])
            scored.view(-1)[places] |= new
        self.statistics.observe(slots, matched, confidence, scored)

    def _count(self, slots: torch.Tensor, verified: Verified) -> None:
        drafted = torch.minimum(verified.drafted, self._length[slots])
        accepted = torch.minimum(verified.accepted, drafted)
        allowed = self._allowed[slots] & verified.sampled
        self._tally.add(self._exit[slots], drafted, accepted, self._expected[slots], allowed)
        if self._stopwatch:
            seconds = self._stopwatch.verified(slots, verified.num_tokens, verified.contexts, verified.only_decodes)
            if seconds is not None:
                self._tally.add_time(*seconds)

    def _observe_prompts(self, slots: torch.Tensor, verified: Verified) -> None:
        """Seed the statistics of sequences whose prompt ends here, with what the target says within the prompt."""
        row = upload([row for row, positions in verified.ended for _ in range(positions)], slots.device)
        back = upload([1 + i for _, positions in verified.ended for i in range(positions)], slots.device)
        each = len(self._each_exit) + 1
        number = self._shadow.affordable(len(row) * each) // each
        if not number:
            return
        chosen = self._shadow.choose(torch.ones_like(row, dtype=torch.bool), number)
        row, back = row[chosen], back[chosen]
        at = (verified.start[row] - back).repeat_interleave(each)
        exit = torch.arange(each, device=slots.device).repeat(number)
        token, probability = self._shadow.score(verified.states, at, exit)
        token, probability = token.view(number, each), probability.view(number, each)
        # [rows, positions, exits]
        shape = (len(slots), PROMPT_POSITIONS, each - 1)
        matched = torch.zeros(shape, dtype=torch.bool, device=slots.device)
        scored, confidence = torch.zeros_like(matched), torch.zeros(shape, device=slots.device)
        matched[row, back - 1] = token[:, :-1] == token[:, -1:]
        confidence[row, back - 1] = probability[:, :-1]
        scored[row, back - 1] = True
        self.statistics.observe(slots, matched, confidence, scored)

    def plan(
        self,
        # [rows] each: slots, the longest draft of each row, and its context length
        slots: torch.Tensor,
        limit: torch.Tensor,
        context: torch.Tensor,
    ) -> Plan:
        if self._choice is None:
            self._choice, self._age = self._choose(slots, limit, context), 0
        choice = self._choice
        # What there is room for may be less by now.
        exit, length = choice.exit, torch.minimum(choice.length, limit)
        wanted = torch.stack(((exit * (length > 0)).max(), length.max()))
        if self._on_host:
            deepest, longest = wanted.tolist()
        else:
            (deepest, longest), _ = self._bounds.exchange(wanted)
            exit, length = exit.clamp_max(deepest), length.clamp_max(longest)
        stop_below, expected = (
            values.gather(1, exit.unsqueeze(1)).squeeze(1) for values in (choice.stop_below, choice.acceptance)
        )
        self._drafts = longest > 0
        self._allowed[slots] = limit > 0
        self._expected[slots] = expected.nan_to_num()
        return Plan(exit, length, stop_below, deepest, longest)

    def _choose(self, slots: torch.Tensor, limit: torch.Tensor, context: torch.Tensor) -> "Choice":
        stop_below = self.statistics.stop_below(slots)
        if self.planner is None:
            acceptance = self.statistics.acceptance(slots)
            exit, _ = best_by_tokens_per_layer(acceptance, self._depths, self._num_layers, self.max_length)
            longest = torch.full_like(limit, self.max_length)
            return Choice(slots, exit, longest, stop_below, acceptance)
        acceptance = self.statistics.estimate(slots)
        decision = self.planner.plan(acceptance, limit, context)
        # The paper's threshold is where matches and mismatches look alike. Where most drafts match, one below it may
        # still be accepted: it ends a draft only if the next one would also not be worth its time.
        pays_above = self.statistics.confidence_of(slots, decision.worth.unsqueeze(1) / acceptance)
        stop_below = torch.minimum(stop_below, pays_above)
        return Choice(slots, decision.exit, decision.length, stop_below, acceptance)

    def record(self, slots: torch.Tensor, plan: Plan, drafts: Drafts, launched: Launched) -> None:
        """Rows beyond those of `slots` are padding."""
        num_rows, width = len(slots), drafts.confidence.shape[1]
        self._exit[slots] = plan.exit[:num_rows]
        self._length[slots] = (drafts.tokens[:num_rows] != NO_TOKEN).sum(1)
        self._confidence[slots, :width] = drafts.confidence[:num_rows]
        if self._stopwatch:
            self._stopwatch.drafted(slots, launched)
