"""A plan that serves many rounds, while sequences come and go under it.

With made-up costs, beside which planning takes nothing, every other test on an engine plans in every round.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import host as engines
from tests.engine.checkpoints import checkpoint
from tests.engine.host import Arrival, Host
from tests.engine.test_drafts import drafter_of
from vllm_del.draft import tally
from vllm_del.draft.clock import Pace
from vllm_del.draft.loop import Plan

SPEC = {"method": "del", "del_exit_layers": [1, 3], "num_speculative_tokens": 3}
# So few blocks that sequences are preempted, and chunks of prompts beside decoding rows.
ENGINE = {"num_gpu_blocks_override": 12, "max_num_batched_tokens": 48}
GREEDY = {"temperature": 0, "ignore_eos": True}
UNWILLING = {"extra_args": {"del": {"enabled": False}}}

pytestmark = pytest.mark.engine


def test_sequences_come_and_go_under_a_plan(host: Host, checkpoints: Path) -> None:
    """The output is the same, who wants no drafts makes none, and drafting goes on."""
    model = checkpoint(checkpoints, "llama")
    arrivals = [
        Arrival(
            prompt=[(5 * i + j) % 150 + 5 for j in range(90 if i % 3 == 2 else 12)],
            sampling=GREEDY | {"max_tokens": 30 + 7 * (i % 5)} | (UNWILLING if i % 4 == 1 else {}),
            step=4 * i,
            abort_at=4 * i + 9 if i == 5 else None,
        )
        for i in range(14)
    ]
    off = host.serve(model, arrivals, None, **ENGINE)
    host.call(_plan_rarely, model)
    try:
        on = host.serve(model, arrivals, SPEC, **ENGINE)
    finally:
        work = host.call(_as_before, model)
    aborted = 5
    assert [c for i, c in enumerate(on.completions) if i != aborted] == [
        c for i, c in enumerate(off.completions) if i != aborted
    ]
    assert on.preemptions > 0
    assert work["rounds"] > 2 * work["plans"] > 0
    assert work["of the unwilling"] == 0
    assert work["unwilling"] > 0
    assert on.accepted > 0


def test_rounds_are_passed_over_while_nothing_is_expected_of_drafts(host: Host, checkpoints: Path) -> None:
    """They do next to nothing, and drafting goes on when a plan says so."""
    model = checkpoint(checkpoints, "llama")
    prompts, sampling = [[5, 6, 7], list(range(20, 30))], GREEDY | {"max_tokens": 90}
    off = host.generate(model, prompts, sampling, None, **ENGINE)
    host.call(_plan_rarely, model)
    host.call(_expect_nothing, model, 45)
    try:
        on = host.generate(model, prompts, sampling, SPEC, **ENGINE)
    finally:
        operations = host.call(_operations, model)
        work = host.call(_as_before, model)
    assert on.completions == off.completions
    assert on.accepted > 0
    rested = [number for number, rests in operations if rests]
    assert len(rested) > 20, operations
    # Views among them, and what is of the host on any machine.
    assert sorted(rested)[len(rested) // 2] <= 12, operations
    assert min(number for number, rests in operations if not rests) > 50
    assert work["rounds"] == len(operations) - len(rested)


def _expect_nothing(model: str, rounds: int) -> None:
    """In the engine's process: for so many rounds; and from now on tensor operations of rounds are counted."""
    from tests.draft.test_no_waits import Watch

    drafter = drafter_of(engines._engine(model, SPEC, ENGINE))
    policy, operations = drafter.policy, []
    # Counts are told after some time, of which steps in an interpreter take much.
    drafter.usual_time, tally.FLUSH_SECONDS = tally.FLUSH_SECONDS, math.inf
    estimate, rest, propose = policy.statistics.estimate, policy.rest, drafter.propose
    drafter.counted_operations = operations

    def rested(*args: Any) -> bool:
        rests = rest(*args)
        operations[-1][1] = rests
        return rests

    def estimated(slots: torch.Tensor) -> torch.Tensor:
        known = estimate(slots)
        return torch.full_like(known, 0.01) if len(operations) < rounds else known

    def proposed(*args: Any, **kwargs: Any) -> Any:
        operations.append([0, False])
        with Watch() as watch:
            proposal = propose(*args, **kwargs)
        operations[-1][0] = watch.number
        return proposal

    policy.statistics.estimate, policy.rest, drafter.propose = estimated, rested, proposed


def _operations(model: str) -> list[tuple[int, bool]]:
    """Of each round: how many, and whether it was passed over."""
    drafter = drafter_of(engines._engine(model, SPEC, ENGINE))
    del drafter.policy.statistics.estimate, drafter.policy.rest, drafter.propose
    tally.FLUSH_SECONDS = drafter.usual_time
    return [(number, rests) for number, rests in drafter.counted_operations]


def _policy(model: str) -> Any:
    return drafter_of(engines._engine(model, SPEC, ENGINE)).policy


def _plan_rarely(model: str) -> None:
    """In the engine's process: plans are as dear as can be, and what rows that want no drafts make is counted."""
    policy = _policy(model)
    work = policy.counted_work = Counter()
    policy.usual_pace, policy.pace = policy.pace, Pace(1e6, policy.planner.costs, learns=False)
    choose, plan = policy._choose, policy.plan

    def chosen(*args: Any) -> Any:
        work["plans"] += 1
        return choose(*args)

    def planned(slots: torch.Tensor, wished: torch.Tensor, *args: Any) -> Plan:
        of_round = plan(slots, wished, *args)
        work["rounds"] += 1
        work["unwilling"] += int((wished == 0).sum())
        work["of the unwilling"] += int(of_round.length[wished == 0].sum())
        return of_round

    policy._choose, policy.plan = chosen, planned


def _as_before(model: str) -> dict[str, int]:
    policy = _policy(model)
    policy.pace = policy.usual_pace
    del policy._choose, policy.plan
    return {name: policy.counted_work[name] for name in ("plans", "rounds", "unwilling", "of the unwilling")}
