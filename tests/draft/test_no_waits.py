"""On a GPU the host never waits for the device while it observes and plans."""

import inspect
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_del.draft.clock import Pace, Stopwatch
from vllm_del.draft.decide import DynamicPolicy
from vllm_del.draft.head import Head, most_probable, quantise
from vllm_del.draft.loop import Drafts, Launched
from vllm_del.draft.shadow import ShadowScorer
from vllm_del.draft.verified import Verified
from vllm_del.draft.vocabulary import FIRST, DraftVocabulary
from vllm_del.policy.cost import SHADOW_ROWS, CostTables, MeasuredCosts
from vllm_del.policy.planner import Planner

CPU = torch.device("cpu")
EXITS, LAYERS, LENGTH, ROWS, HIDDEN = [2, 4], 8, 3, 4, 16
# These read a value of the device, or have a shape that depends on one.
WAITING = {"_local_scalar_dense", "nonzero", "item", "masked_select", "equal", "is_nonzero"}


class Watch(TorchDispatchMode):
    """Notes the operations that would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.seen: list[str] = []
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.number += 1
        # So is a number that is put at places: it is copied to the device first.
        number_put = name.startswith("index_put") and not args[2].dim()
        if name in WAITING or number_put:
            self.seen.append(name)
            self.places.append(_place())
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """The innermost function of ours or vLLM's that runs now, as file:function."""
    for frame, _ in traceback.walk_stack(inspect.currentframe()):
        # By module: a checkout may lie in a folder of any name.
        if frame.f_globals.get("__name__", "").split(".")[0] in ("vllm", "vllm_del"):
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"
    return ""


class DeviceHead(Head):
    """States are its logits, which it reads as where the device is not the host."""

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return most_probable(hidden_states)


def policy(objective: str, on_host: bool = False) -> DynamicPolicy:
    """As the V2 runner has it, where the host does not see the device's values, or as the V1 runner."""

    head = DeviceHead()
    costs, planner, stopwatch = None, None, None
    if objective == "goodput":
        places = (1, SHADOW_ROWS)
        measured = MeasuredCosts(0.1, places, (1.0, 2.0), places, (0.01, 0.02), places, (9.0, 99.0))
        costs = CostTables(measured, ROWS, LENGTH, CPU)
        planner = Planner(torch.tensor(EXITS), costs, LENGTH)
        stopwatch = Stopwatch(costs, EXITS, learns=False)
    shadow = ShadowScorer(lambda states: states, head, head, costs, 0.5, CPU)
    return DynamicPolicy(EXITS, LAYERS, LENGTH, 16, shadow, planner, CPU, on_host, stopwatch)


def verification(ended: Sequence[tuple[int, int]] = (), fresh: Sequence[int] = ()) -> Verified:
    tokens = ROWS * (1 + LENGTH) + 5
    return Verified(
        states=[torch.rand(tokens, HIDDEN) for _ in range(len(EXITS) + 1)],
        input_ids=torch.randint(HIDDEN, (tokens,)),
        start=torch.arange(ROWS) * (1 + LENGTH) + 5,
        drafted=torch.full((ROWS,), LENGTH),
        accepted=torch.tensor([0, 3, 1, 2]),
        next_token=torch.randint(HIDDEN, (ROWS,)),
        sampled=torch.tensor([True, True, True, False]),
        longest=LENGTH,
        num_tokens=tokens,
        contexts=50 * ROWS,
        only_decodes=not ended,
        came=len(fresh),
        left=len(fresh),
        ended=ended,
        fresh=fresh,
    )


@pytest.mark.parametrize("objective", ["goodput", "tpl"])
@pytest.mark.parametrize("ended", [[], [(1, 5)]])
def test_a_round(objective: str, ended: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    mine, slots = policy(objective), torch.tensor([3, 1, 0, 7])
    verified = verification(ended)
    limit, context = torch.full((ROWS,), LENGTH), torch.full((ROWS,), 50)
    launched = Launched([(ROWS, 1)] * LENGTH, 0.1)
    watch, vocabulary = Watch(), DraftVocabulary(HIDDEN // 2, HIDDEN, CPU)
    copy = torch.empty(HIDDEN // 2, HIDDEN, dtype=torch.float8_e4m3fn), torch.empty(HIDDEN // 2)
    vocabulary.follow(partial(quantise, torch.rand(HIDDEN, HIDDEN), vocabulary.tokens, *copy))
    for _ in range(2 * FIRST // ROWS):
        with watch:
            vocabulary.observe(verified)
            mine.observe(slots, verified)
            plan = mine.plan(slots, limit, limit, context)
            drafts = Drafts(torch.zeros(ROWS, LENGTH, dtype=torch.int64), torch.rand(ROWS, LENGTH))
            mine.record(slots, plan, drafts, launched)
        counts = mine.counts()
    assert watch.seen == []
    assert counts is None or sum(counts.lengths) > 0
    assert float(mine.statistics._counts.sum()) > 0
    assert vocabulary.tokens.tolist() != list(range(HIDDEN // 2))
    with watch:
        assert torch.ones(2)[1].item() == 1
        torch.ones(2)[torch.tensor([1])] = 0
    assert len(watch.seen) == 2, "the watch sees nothing"


def operations(planning: float, drafts: bool) -> float:
    """Of a round in which the batch is another one, with one new sequence in nine rounds."""
    torch.manual_seed(0)
    mine, watch, rounds = policy("goodput"), Watch(), 90
    mine.pace = Pace(planning, mine.planner.costs, learns=False)  # type: ignore[union-attr]
    limit, context = torch.full((ROWS,), LENGTH), torch.full((ROWS,), 50)
    for number in range(rounds):
        slots = torch.tensor([number // 9 % 5, 6, 7, 8])
        verified = verification(fresh=[0] if number % 9 == 0 else [])
        if not drafts:
            verified.longest, verified.drafted, verified.accepted = 0, limit * 0, limit * 0
        with watch:
            mine.observe(slots, verified)
            plan = mine.plan(slots, limit, limit, context)
            said = Drafts(torch.zeros(ROWS, LENGTH, dtype=torch.int64), torch.rand(ROWS, LENGTH))
            mine.record(slots, plan, said, Launched([(ROWS, 1)] * LENGTH, 0.1))
    assert watch.seen == []
    return watch.number / rounds


def test_sequences_come_and_go() -> None:
    """Where planning is dear little of it is left, also in batches that change, and nothing waits."""
    each, rarely, idle = operations(0.0, True), operations(1e6, True), operations(1e6, False)
    assert rarely < 0.6 * each
    assert idle < 0.3 * each
