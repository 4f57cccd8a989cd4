"""A plan serves several rounds where making one takes long beside a round, while most of its sequences are there."""

from collections.abc import Sequence

import pytest
import torch

from tests.draft.test_no_waits import EXITS, HIDDEN, LENGTH, ROWS, policy, verification
from vllm_del.draft.clock import EARLY_SHARE, IDLE_SHARE, LAST, MOST_ROUNDS, PLANNING_SHARE, Pace
from vllm_del.draft.loop import NO_TOKEN, Drafts, Launched
from vllm_del.draft.outcome import Outcome, matches
from vllm_del.draft.shadow import PROMPT_POSITIONS
from vllm_del.draft.verified import Verified
from vllm_del.policy.acceptance import AcceptanceStatistics
from vllm_del.policy.cost import Correction


def verified(fresh: Sequence[int] = (), drafts: int = 0) -> Verified:
    zeros = torch.zeros(ROWS, dtype=torch.int64)
    fields = dict.fromkeys(("input_ids", "start", "drafted", "accepted", "next_token"), zeros)
    states = [torch.rand(ROWS, HIDDEN) for _ in range(len(EXITS) + 1)]
    more = {"states": states, "longest": drafts, "num_tokens": ROWS, "contexts": 0, "ended": []}
    more |= {"fresh": fresh, "came": len(fresh), "left": len(fresh)}
    return Verified(**fields, **more, sampled=zeros == 0, only_decodes=not fresh)  # type: ignore[arg-type]


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
        learning.planned(1.8 * share)
    assert learning.rounds(ROWS, True, 100) == 2
    assert Pace(1e6, costs, learns=False).rounds(ROWS, True, 100) == MOST_ROUNDS


def test_who_is_in_the_batch() -> None:
    """A plan for four serves while one of them is another; with two others it is made anew."""
    costs = policy("goodput").planner.costs  # type: ignore[union-attr]
    pace = Pace(0.99 * EARLY_SHARE * costs.verify_seconds(3), costs, learns=False)

    def due(num_rows: int, came: int = 0, left: int = 0) -> bool:
        pace.begin(num_rows, num_rows, came, left)
        if is_due := pace.is_due(drafts=True):
            pace.planned(0.0)
        return is_due

    assert [due(4, came=4), due(4), due(4), due(4), due(4)] == [True, True, True, False, True]
    # Each plan of four has its own count of who came and left, and the batch does not begin anew.
    assert [due(3, left=1), due(4, came=1), due(4)] == [False, False, False]
    assert [due(4, came=1, left=1), due(4)] == [True, False]
    assert [due(6, came=2), due(3, left=3)] == [True, True]
    # One by one, and all of them at once.
    assert [due(3, came=1, left=1), due(3, came=1, left=1)] == [False, True]
    assert [due(3, came=3, left=3), due(3), due(3), due(3), due(3)] == [True, True, True, False, True]
    # Of many sequences most are new: as good as all.
    for _ in range(8):
        due(3)
    assert [due(15, came=12), due(15), due(15), due(15), due(15)] == [True, False, True, False, False]


def test_of_a_small_model_new_sequences_are_served_by_the_last_plan_for_some_rounds() -> None:
    """Where a plan takes a tenth of a verification, no more is made than one in every other round."""
    costs = policy("goodput").planner.costs  # type: ignore[union-attr]
    planning = 1.99 * EARLY_SHARE * costs.verify_seconds(4)

    def due(batches: Sequence[int], drafts: bool = True, tokens: int = 0) -> list[int]:
        """Rounds with a plan of their own, where so many sequences are there, others in each from round 3 on."""
        pace, found = Pace(planning, costs, learns=False), []
        for number, num_rows in enumerate(batches):
            came = num_rows if number in (0, *range(3, len(batches))) else 0
            pace.begin(num_rows, num_rows + tokens, came=came, left=batches[number - 1] if came and number else 0)
            if pace.is_due(drafts):
                pace.planned(0.0)
                found.append(number)
        return found

    assert due([4] * 10) == [0, 2, 4, 6, 8]
    # What prompts took counts too.
    assert due([4] * 10, tokens=40) == [*range(10)]
    # Of another size
    assert due([4] * 5 + [1, 1, 1, 4, 4, 4]) == [0, 2, 4, 5, 8, 10]
    # Where nothing is drafted
    assert due([4] * 10, drafts=False) == [0, *range(2, 10)]


def test_new_sequences_do_not_wait_for_as_long_as_a_plan_without_drafts_serves() -> None:
    costs = policy("goodput").planner.costs  # type: ignore[union-attr]
    pace = Pace(2.9 * IDLE_SHARE * costs.verify_seconds(ROWS), costs, learns=False)
    for number in range(8):
        pace.begin(4, 4, came=0 if number else 4)
        if pace.is_due(drafts=False):
            pace.planned(0.0)
    pace.begin(4, 4)
    assert not pace.is_due(drafts=False)
    assert not pace.is_due(drafts=False, ahead=1)
    pace.begin(4, 4, came=1)
    assert pace.is_due(drafts=False)


def test_made_anew_when_due_or_for_others() -> None:
    mine, slots = policy("goodput"), torch.tensor([3, 1, 0, 7])
    one_other, others = torch.tensor([3, 1, 0, 8]), torch.tensor([5, 6, 0, 8])
    costs, limit = mine.planner.costs, torch.full((ROWS,), LENGTH)  # type: ignore[union-attr]
    mine.pace = Pace(2.9 * PLANNING_SHARE * costs.verify_seconds(ROWS), costs, learns=False)
    # So that drafting pays.
    mine.statistics.estimate = lambda of: torch.full((len(of), len(EXITS)), 0.99).double()  # type: ignore[method-assign]
    made = []
    original = mine._choose
    mine._choose = lambda *args: made.append(1) or original(*args)  # type: ignore[func-returns-value, method-assign]

    def made_by(batch: torch.Tensor, fresh: Sequence[int] = ()) -> bool:
        before = len(made)
        mine.observe(batch, verified(fresh))
        plan = mine.plan(batch, limit, limit, limit)
        assert plan.exit.shape == limit.shape
        assert plan.length.tolist() == [LENGTH] * ROWS
        return len(made) > before

    assert [made_by(slots, fresh=range(0 if turn else ROWS)) for turn in range(12)] == [
        place in (0, 1, 2, 4, 7, 10) for place in range(12)
    ]
    assert [made_by(one_other, fresh=[3]), made_by(one_other), made_by(one_other)] == [False, True, False]
    assert made_by(others, fresh=[0, 1])
    # The same ones in other rows
    assert not made_by(others.flip(0))


@pytest.mark.parametrize("on_host", [True, False])
def test_rounds_without_drafts_are_passed_over_until_a_plan_is_due(on_host: bool) -> None:
    """With the same plans in the same rounds, and the same counts, as if each one had been observed and planned."""
    slots, others = torch.tensor([3, 1, 0, 7]), torch.tensor([3, 1, 5, 8])
    limit, nothing = (
        torch.full((ROWS,), LENGTH),
        Drafts(torch.full((ROWS, LENGTH), NO_TOKEN), torch.zeros(ROWS, LENGTH)),
    )

    def serve(may_rest: bool) -> tuple[list[int], list[bool], list[float]]:
        mine, planned, rested = policy("goodput", on_host), [], []
        costs = mine.planner.costs  # type: ignore[union-attr]
        rounds_of_a_plan = 2.9 if on_host else 9.9
        mine.pace = Pace(rounds_of_a_plan * IDLE_SHARE * costs.verify_seconds(ROWS), costs, learns=False)
        mine.statistics.estimate = lambda of: torch.full((len(of), len(EXITS)), 0.01).double()  # type: ignore[method-assign]
        original = mine._choose
        mine._choose = lambda *args: planned.append(len(rested) - 1) or original(*args)  # type: ignore[func-returns-value, method-assign]
        for number, batch in enumerate([slots] * 40 + [others] * 8):
            rested.append(may_rest and mine.rest(batch, 0, ROWS))
            if not rested[-1]:
                of_round = verified(fresh={0: range(ROWS), 40: [2, 3]}.get(number, ()))
                mine.observe(batch, of_round)
                plan = mine.plan(batch, limit, limit, limit)
                assert (number < 2 and not on_host) or not plan.longest
                mine.record(batch, plan, nothing, Launched([], 0.0))
        return planned, rested, mine._tally.flush().tolist()

    (planned, rested, counts), (of_all, _, counts_of_all) = serve(True), serve(False)
    assert planned == of_all
    awake = [number for number, rests in enumerate(rested) if not rests]
    if on_host:
        assert planned[:6] == [0, 1, 2, 4, 7, 10]
        assert awake == planned
    else:
        # It knows of a plan two rounds late, and rests in all that it then still serves.
        assert awake == sorted({of + late for of in planned for late in (0, 1, 2)} & {*range(len(rested))})
        assert sum(rested) > len(rested) / 4
    # The first round of all, and of others, is of what was drafted before it, which is nothing.
    assert counts[:-2] == counts_of_all[:-2]
    assert sum(counts[-2 - 1 - LENGTH : -2]) > 0


@pytest.mark.parametrize("on_host", [True, False])
def test_a_plan_of_drafts_is_not_passed_over(on_host: bool) -> None:
    mine, slots = policy("goodput", on_host), torch.tensor([3, 1, 0, 7])
    mine.pace = Pace(100.0, mine.planner.costs, learns=False)  # type: ignore[union-attr]
    mine.statistics.estimate = lambda of: torch.full((len(of), len(EXITS)), 0.99).double()  # type: ignore[method-assign]
    for _ in range(12):
        assert not mine.rest(slots, 0, ROWS)
        mine.observe(slots, verified())
        # It is one of drafts, also in a round that has no room for any.
        limit = torch.full((ROWS,), 0 if mine._choice else LENGTH)
        mine.plan(slots, limit, limit, torch.zeros(ROWS))
        assert mine._choice is not None


def test_what_there_is_room_for_is_new_each_round() -> None:
    mine, slots = policy("tpl", on_host=True), torch.tensor([3, 1, 0, 7])
    mine.pace = Pace(1.0, policy("goodput").planner.costs, learns=False)  # type: ignore[union-attr]
    wished = torch.tensor([LENGTH, LENGTH, 0, LENGTH])
    for most in (0, LENGTH, 1, 2):
        mine.observe(slots, verified())
        plan = mine.plan(slots, wished, torch.full((ROWS,), most), torch.zeros(ROWS))
        assert plan.length.tolist() == [most, most, 0, most]
        # It is told that there is more to be made room for.
        assert mine.wanted.tolist() == wished.tolist()


def test_the_host_knows_the_bounds_two_rounds_late_however_long_a_choice_serves() -> None:
    """Not two choices late, in which steps would be launched that no row drafts in."""
    mine, slots = policy("goodput"), torch.tensor([3, 1, 0, 7])
    mine.pace = Pace(100.0, mine.planner.costs, learns=False)  # type: ignore[union-attr]
    seen = []
    for _ in range(4):
        mine.observe(slots, verified())
        seen.append(mine.plan(slots, *[torch.ones(ROWS, dtype=torch.int64)] * 2, torch.zeros(ROWS)).longest)
    assert seen[:2] == [LENGTH, LENGTH]
    # What is drawn at random may make one of the two choices draft nothing.
    assert max(seen[2:]) <= 1


def test_a_prompt_counts_in_its_own_round_of_those_that_a_plan_served() -> None:
    """What waits until the next plan is heard round by round, the prompt with the last one."""
    slots, mine, due = torch.tensor([3, 1, 0, 7]), policy("goodput"), iter((False, False, False, True))
    mine.pace = Pace(0.0, mine.planner.costs, learns=False)  # type: ignore[union-attr]
    mine.pace.is_due = lambda *_: next(due)  # type: ignore[method-assign]
    shape = (1, ROWS, PROMPT_POSITIONS, len(EXITS))
    row = torch.zeros(shape, dtype=torch.bool).index_fill(1, torch.tensor([2]), True)
    prompt = torch.rand(shape) < 0.5, torch.rand(shape), row
    mine.asker.in_prompts = lambda *_: prompt  # type: ignore[method-assign]
    mine.asker.after_drafts = lambda *_: None  # type: ignore[method-assign]
    limit, expected = torch.full((ROWS,), LENGTH), AcceptanceStatistics(16 + 1, len(EXITS), torch.device("cpu"))
    for number in range(5):
        of_round = verification([(2, 5)] if number == 4 else [])
        outcome = Outcome(mine._last.of(slots), of_round.drafted, of_round.accepted, of_round.sampled)
        seen = matches([outcome], len(EXITS))[:3]
        if number == 4:
            seen = tuple(torch.cat((of_prompt, after), 2) for of_prompt, after in zip(prompt, seen, strict=True))
        expected.observe(slots, *seen)
        mine.observe(slots, of_round)
        plan = mine.plan(slots, limit, limit, limit)
        said = Drafts(torch.zeros(ROWS, LENGTH, dtype=torch.int64), torch.rand(ROWS, LENGTH))
        mine.record(slots, plan, said, Launched([(ROWS, 1)] * LENGTH, 0.1))
    for sums in ("_counts", "_confidence", "_squares"):
        assert torch.allclose(getattr(mine.statistics, sums), getattr(expected, sums))
    assert expected._counts[0].sum() > PROMPT_POSITIONS
