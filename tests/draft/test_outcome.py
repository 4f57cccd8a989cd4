"""What was drafted is found again in another batch, and what came of it is what verification said."""

import pytest
import torch

from tests.draft.test_no_waits import EXITS, LENGTH, policy
from tests.draft.test_pace import verified
from vllm_del.draft.clock import Pace
from vllm_del.draft.loop import Drafts, Launched
from vllm_del.draft.outcome import Drafted, LastDrafts, Outcome, matches

CPU = torch.device("cpu")


def drafted(*rows: tuple[int, int, float, bool, list[float]]) -> Drafted:
    return Drafted(*(torch.tensor(column) for column in zip(*rows, strict=True)))


def same(left: Drafted, right: Drafted) -> bool:
    """Up to the number format."""
    return all(
        torch.equal(a.double(), b.double()) for a, b in zip(vars(left).values(), vars(right).values(), strict=True)
    )


A = (1, 3, 0.5, True, [0.5, 0.25, 0.75])
B = (0, 1, 0.25, True, [1.0, 0.0, 0.0])
C = (2, 0, 0.75, False, [0.0, 0.0, 0.0])
NOTHING = (0, 0, 0.0, False, [0.0, 0.0, 0.0])


def test_found_in_other_rows_and_batches() -> None:
    last, both, others = LastDrafts(4, 3, CPU), torch.tensor([3, 1]), torch.tensor([1, 2, 3])
    assert same(last.of(both), drafted(NOTHING, NOTHING))
    last.keep(both, drafted(A, B))
    assert same(last.of(both), drafted(A, B))
    assert same(last.of(others), drafted(B, NOTHING, A))
    assert same(last.of(both), drafted(A, B))
    # One that pauses keeps what it had.
    last.keep(torch.tensor([2]), drafted(C))
    assert same(last.of(others), drafted(B, C, A))


def test_another_sequence_in_a_slot_has_drafted_nothing() -> None:
    last, both = LastDrafts(4, 3, CPU), torch.tensor([3, 1])
    last.keep(both, drafted(A, B))
    last.forget(torch.tensor([3]))
    assert same(last.of(both), drafted(NOTHING, B))


def test_matches_are_what_verification_kept() -> None:
    yes, no = True, False
    outcomes = [
        # All accepted, and the first one rejected; then fewer verified than drafted, and an unfinished prompt.
        Outcome(drafted(A, B), torch.tensor([3, 1]), torch.tensor([3, 0]), torch.tensor([yes, yes])),
        Outcome(drafted(A, B), torch.tensor([2, 1]), torch.tensor([1, 1]), torch.tensor([yes, no])),
    ]
    matched, confidence, scored, kept = matches(outcomes, 3)
    assert matched.shape == confidence.shape == scored.shape == (2, 2, 4, 3)
    assert kept.tolist() == [[[yes] * 4, [yes, no, no, no]], [[yes, yes, no, no], [no] * 4]]
    assert scored[0, 0].tolist() == [[no, yes, no]] * 3 + [[no] * 3]
    assert scored[0, 1].tolist() == [[yes, no, no]] + [[no] * 3] * 3
    assert scored[1, 0].tolist() == [[no, yes, no]] * 2 + [[no] * 3] * 2
    assert not scored[1, 1].any()
    assert matched.nonzero().tolist() == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 2, 1], [1, 0, 0, 1]]
    assert confidence[0, 0, :3, 1].tolist() == A[-1]


@pytest.mark.parametrize("others_follow", [False, True])
def test_rounds_without_a_new_plan_are_learnt_from_too(others_follow: bool) -> None:
    """When the next plan is made, or when the batch changes: then for those who drafted."""
    mine, slots, others = policy("goodput"), torch.tensor([3, 1, 0, 7]), torch.tensor([5, 1, 0, 7])
    mine.pace = Pace(1.0, mine.planner.costs, learns=False)  # type: ignore[union-attr]
    mine.pace.rounds = lambda *_: 5  # type: ignore[method-assign]
    rows = len(slots)
    limit, tokens = torch.full((rows,), LENGTH), torch.ones(rows, LENGTH, dtype=torch.int64)

    def round(batch: torch.Tensor, accepted: int) -> None:
        outcome = verified(drafts=LENGTH)
        outcome.drafted, outcome.accepted = torch.full((rows,), LENGTH), torch.full((rows,), accepted)
        mine.observe(batch, outcome)
        plan = mine.plan(batch, limit, limit, limit)
        mine.record(batch, plan, Drafts(tokens, torch.ones(rows, LENGTH)), Launched([], 0.0))

    mine.shadow.share = 0.0
    for accepted in (0, LENGTH, 1, LENGTH):
        round(slots, accepted)
    assert float(mine.statistics._counts.sum()) == 0
    round(others if others_follow else slots, 0)
    for _ in range(0 if others_follow else 1):
        round(slots, 0)
    # Nothing was verified before the first of them, and after a rejection the rest is unknown.
    decay = mine.statistics.decay
    matches_, misses = LENGTH * decay**2 + 1 * decay + LENGTH, 1 * decay
    if not others_follow:
        matches_, misses = matches_ * decay**2, misses * decay**2 + decay + 1
    found = mine.statistics._counts[3].sum(0)
    assert found.tolist() == pytest.approx([matches_, misses])
    assert len(EXITS) == len(mine.statistics._counts[3])
