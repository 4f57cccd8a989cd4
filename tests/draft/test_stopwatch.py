"""What the clock says of rounds corrects the tables, where the host sees what the device does."""

from types import SimpleNamespace

import pytest
import torch

from vllm_del.draft import clock
from vllm_del.draft.clock import ROUNDS, Stopwatch
from vllm_del.draft.loop import Launched
from vllm_del.policy.cost import Correction, CostTables, MeasuredCosts

DEPTHS, ROWS, CONTEXTS = [2, 4], 2, 100
STEPS = [(2, 1), (2, 1), (1, 0)]
COSTS = CostTables(
    MeasuredCosts(0.25, (1, 2), (1.0, 1.5), (1, 2), (0.5, 0.5), (1, 2, 16), (10.0, 10.0, 24.0)),
    ROWS,
    4,
    torch.device("cpu"),
)
# Two steps of both rows through four layers, and one of one row through two.
DRAFTING = 2 * (0.25 + 4 * 1.5 + 0.5) + (0.25 + 2 * 1.0 + 0.5)
VERIFYING = 13.0  # of five tokens


class Rounds:
    """A machine on which drafting, verification and all else take what is said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, learns: bool = True) -> None:
        self.now = 0.0
        monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: self.now))
        self.stopwatch = Stopwatch(COSTS, DEPTHS, learns)
        self.slots = torch.arange(ROWS)

    def round(self, draft: float, verify: float, beside: float, only_decodes: bool = True):
        """Factors, and seconds; gives what was expected of the round and what it took."""
        self.stopwatch.correction()
        launched = Launched(STEPS, draft * DRAFTING)
        self.now += launched.seconds
        self.stopwatch.drafted(self.slots, launched)
        self.now += verify * VERIFYING + beside
        return self.stopwatch.verified(self.slots, 5, CONTEXTS, only_decodes)


def test_a_machine_as_measured_needs_no_correction(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds(monkeypatch)
    assert all(rounds.round(1.0, 1.0, 0.0) == pytest.approx((DRAFTING + VERIFYING,) * 2) for _ in range(9))
    assert rounds.stopwatch.correction() == Correction(*map(pytest.approx, (1.0, 1.0, 0.0)))


@pytest.mark.parametrize(("draft", "verify", "beside"), [(1.5, 1.0, 4.0), (0.7, 0.8, 0.0)])
def test_another_pace_is_learnt(monkeypatch: pytest.MonkeyPatch, draft: float, verify: float, beside: float) -> None:
    rounds = Rounds(monkeypatch)
    for _ in range(12):
        expected, took = rounds.round(draft, verify, beside)
    assert expected == pytest.approx(took)
    assert rounds.stopwatch.correction() == Correction(*map(pytest.approx, (draft, verify, beside)))
    # And forgotten.
    for _ in range(ROUNDS):
        rounds.round(1.0, 1.0, 0.0)
    assert rounds.stopwatch.correction() == Correction(*map(pytest.approx, (1.0, 1.0, 0.0)))


def test_a_single_disturbance_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds(monkeypatch)
    rounds.round(9.0, 9.0, 9.0)
    assert rounds.stopwatch.correction() == Correction(*map(pytest.approx, (1.0, 1.0, 0.0)))


def test_a_pause_and_a_prompt_are_no_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds(monkeypatch)
    for _ in range(9):
        assert rounds.round(1.0, 9.0, 9.0, only_decodes=False) is None
        rounds.slots = torch.arange(ROWS)
        assert rounds.stopwatch.verified(rounds.slots, 5, CONTEXTS, only_decodes=True) is None
    assert rounds.stopwatch.correction() == Correction(*map(pytest.approx, (1.0, 1.0, 0.0)))


def test_ranks_that_have_to_agree_are_not_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a host that only launches."""
    rounds = Rounds(monkeypatch, learns=False)
    for _ in range(12):
        expected, took = rounds.round(1.5, 1.0, 4.0)
    assert rounds.stopwatch.correction() == Correction()
    assert expected == pytest.approx(DRAFTING + VERIFYING)
    assert took == pytest.approx(1.5 * DRAFTING + VERIFYING + 4.0)
