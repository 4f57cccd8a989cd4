"""A plan serves several rounds where making one takes long beside a round, and never other sequences."""

import torch

from tests.draft.test_no_waits import EXITS, HIDDEN, LENGTH, ROWS, policy
from vllm_del.draft.clock import LAST, MOST_ROUNDS, PLANNING_SHARE, Pace
from vllm_del.draft.verified import Verified
from vllm_del.policy.cost import Correction


def verified(only_decodes: bool = True) -> Verified:
    zeros = torch.zeros(ROWS, dtype=torch.int64)
    fields = dict.fromkeys(("input_ids", "start", "drafted", "accepted", "next_token"), zeros)
    states = [torch.rand(ROWS, HIDDEN) for _ in range(len(EXITS) + 1)]
    more = {"states": states, "longest": 0, "num_tokens": ROWS, "contexts": 0, "ended": [], "fresh": []}
    return Verified(**fields, **more, sampled=zeros == 0, only_decodes=only_decodes)  # type: ignore[arg-type]


def test_rounds_of_a_plan() -> None:
    costs = policy("goodput").planner.costs  # type: ignore[union-attr]
    share = PLANNING_SHARE * costs.verify_seconds(ROWS)
    paces = [Pace(seconds * share, costs, learns=False) for seconds in (0, 0.45, 0.9, 1.8, 3.5)]
    assert [pace.rounds(ROWS, True, 100) for pace in paces] == [1, 1, 1, 2, 4]
    assert [pace.rounds(ROWS, False, 100) for pace in paces] == [1, 2, 4, 8, 14]
    # No longer than the sequences have been together, and no longer than this on any machine.
    assert [paces[-1].rounds(ROWS, True, age) for age in range(6)] == [1, 1, 2, 3, 4, 4]
    # Of a verification that takes half as long as was measured, and of planning that takes twice as long.
    costs.correction = Correction(0.5, 0.5)
    assert Pace(0.9 * share, costs, learns=False).rounds(ROWS, True, 100) == 2
    costs.correction = Correction()
    learning = Pace(0.9 * share, costs, learns=True)
    for _ in range(LAST):
        learning.took(1.8 * share)
    assert learning.rounds(ROWS, True, 100) == 2
    assert Pace(1e6, costs, learns=False).rounds(ROWS, True, 100) == MOST_ROUNDS


def test_made_anew_when_due_or_for_others() -> None:
    mine, slots, others = policy("goodput"), torch.tensor([3, 1, 0, 7]), torch.tensor([3, 1, 0, 8])
    costs, limit = mine.planner.costs, torch.full((ROWS,), LENGTH)  # type: ignore[union-attr]
    mine.pace = Pace(2.9 * PLANNING_SHARE * costs.verify_seconds(ROWS), costs, learns=False)
    # So that drafting pays.
    mine.statistics.estimate = lambda of: torch.full((len(of), len(EXITS)), 0.99).double()  # type: ignore[method-assign]
    made = []
    original = mine._choose
    mine._choose = lambda *args: made.append(1) or original(*args)  # type: ignore[func-returns-value, method-assign]

    def made_by(batch: torch.Tensor, only_decodes: bool = True) -> bool:
        before = len(made)
        mine.observe(batch, verified(only_decodes))
        plan = mine.plan(batch, limit, limit)
        assert plan.exit.shape == limit.shape
        return len(made) > before

    assert [made_by(slots) for _ in range(12)] == [place in (0, 1, 2, 4, 7, 10) for place in range(12)]
    assert [made_by(others) for _ in range(4)] == [True, True, True, False]
    assert made_by(others, only_decodes=False)
    assert made_by(slots)


def test_what_there_is_room_for_is_new_each_round() -> None:
    mine, slots = policy("tpl"), torch.tensor([3, 1, 0, 7])
    mine.pace = Pace(1.0, policy("goodput").planner.costs, learns=False)  # type: ignore[union-attr]
    for most in (LENGTH, 1, 0, 2):
        mine.observe(slots, verified())
        plan = mine.plan(slots, torch.full((ROWS,), most), torch.zeros(ROWS))
        assert (plan.length <= most).all()


def test_the_host_knows_the_bounds_two_rounds_late_however_long_a_choice_serves() -> None:
    """Not two choices late, in which steps would be launched that no row drafts in."""
    mine, slots = policy("goodput"), torch.tensor([3, 1, 0, 7])
    mine.pace = Pace(100.0, mine.planner.costs, learns=False)  # type: ignore[union-attr]
    seen = []
    for _ in range(4):
        mine.observe(slots, verified())
        seen.append(mine.plan(slots, torch.ones(ROWS, dtype=torch.int64), torch.zeros(ROWS)).longest)
    assert seen[:2] == [LENGTH, LENGTH]
    # What is drawn at random may make one of the two choices draft nothing.
    assert max(seen[2:]) <= 1
