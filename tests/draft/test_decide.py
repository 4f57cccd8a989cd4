"""What a plan says to the round, where the host sees the device's values."""

import pytest
import torch

from tests.draft.test_no_waits import EXITS, LENGTH, ROWS, policy, verification
from vllm_del.draft.choice import Choice
from vllm_del.draft.loop import Drafts, Launched

SLOTS, ZEROS = torch.tensor([3, 1, 0, 7]), torch.zeros(ROWS, dtype=torch.int64)


@pytest.mark.parametrize(
    ("exit", "length", "limit", "alike", "deepest", "longest"),
    [
        ([1, 1, 1, 1], [3, 2, 1, 3], 3, True, 1, 3),
        ([0, 0, 0, 0], [3, 2, 1, 3], 2, True, 0, 2),
        ([0, 1, 1, 1], [3, 2, 1, 3], 3, False, 1, 3),
        # Where rows that draft nothing leave is of no account, whether it is deeper or not.
        ([0, 1, 1, 1], [0, 2, 1, 3], 3, True, 1, 3),
        ([0, 1, 0, 0], [3, 0, 1, 3], 3, True, 0, 3),
        ([0, 1, 0, 1], [3, 3, 3, 3], 0, True, 0, 0),
    ],
)
def test_rows_that_leave_alike(
    exit: list[int], length: list[int], limit: int, alike: bool, deepest: int, longest: int
) -> None:
    """By the plan for as many tokens as there is room for."""
    mine = policy("goodput", on_host=True)
    known = torch.full((ROWS + 1, len(EXITS)), 0.9)
    mine._choose = lambda *_: Choice(SLOTS, torch.tensor([*exit, 1]), torch.tensor([*length, 3]), known, known.double())  # type: ignore[method-assign]
    plan = mine.plan(SLOTS, ZEROS + LENGTH, torch.full((ROWS,), limit), ZEROS)
    assert (plan.alike, plan.deepest, plan.longest) == (alike, deepest, longest)


def test_a_host_that_only_launches_knows_of_none() -> None:
    mine = policy("goodput")
    known, zeros = torch.full((ROWS + 1, len(EXITS)), 0.9), torch.zeros(ROWS + 1, dtype=torch.int64)
    mine._choose = lambda *_: Choice(SLOTS, zeros, zeros + LENGTH, known, known.double())  # type: ignore[method-assign]
    assert [mine.plan(SLOTS, ZEROS + LENGTH, ZEROS + LENGTH, ZEROS).alike for _ in range(4)] == [False] * 4


@pytest.mark.parametrize(
    ("objective", "on_host", "ends"), [("goodput", True, True), ("goodput", False, False), ("tpl", False, True)]
)
def test_confidence_ends_drafts_where_that_saves_something(objective: str, on_host: bool, ends: bool) -> None:
    """Where the host only launches, it would throw drafts away; the paper's objective does as the paper does."""
    torch.manual_seed(0)
    mine, known = policy(objective, on_host), ZEROS + 50
    for _ in range(4):
        mine.observe(SLOTS, verification())
        plan = mine.plan(SLOTS, ZEROS + LENGTH, ZEROS + LENGTH, known)
        drafts = Drafts(torch.zeros(ROWS, LENGTH, dtype=torch.int64), torch.rand(ROWS, LENGTH))
        mine.record(SLOTS, plan, drafts, Launched([(ROWS, 1)] * LENGTH, 0.1))
    assert bool(plan.stop_below.isnan().all()) != ends
