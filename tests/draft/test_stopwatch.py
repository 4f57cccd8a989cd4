"""What the clock says of rounds corrects the tables, where the host sees what the device does."""

from dataclasses import astuple
from types import SimpleNamespace

import pytest
import torch

from tests.draft.test_pace import verified
from vllm_del.draft import clock
from vllm_del.draft.clock import AGAIN, WATCHED, Stopwatch
from vllm_del.draft.decide import DynamicPolicy
from vllm_del.draft.loop import Drafts, Launched
from vllm_del.draft.shadow import ShadowScorer
from vllm_del.policy.cost import Correction, CostTables, MeasuredCosts
from vllm_del.policy.planner import Planner

CPU = torch.device("cpu")
DEPTHS, ROWS, LENGTH = [2, 4], 4, 4
SLOTS = torch.arange(ROWS)
# In seconds; contexts of 100 tokens in the mean, 60 more than the tables have in them.
COSTS = CostTables(
    MeasuredCosts(
        step=0.25,
        rows=(1, 4),
        layer=(1.0, 1.0),
        head_rows=(1, 4),
        head=(0.75, 0.75),
        tokens=(1, 4, 20),
        verify=(16.0, 16.0, 24.0),
        context=40,
        layer_context=0.001,
        verify_context=0.01,
        token_context=0.005,
    ),
    ROWS,
    LENGTH,
    CPU,
)
CONTEXTS = 100 * ROWS
# Two steps of all rows through four layers.
STEPS = [(ROWS, 1), (ROWS, 1)]
DRAFTING = 2 * (0.25 + 4 * (1.0 + 0.001 * 60 * ROWS) + 0.75)
# Of the four last tokens, and what eight drafts are on top of that.
ALONE = 16.0 - 0.01 * 40 * 4 + 0.01 * CONTEXTS
DRAFTS = (24.0 - 0.01 * 40 * 20 - 16.0 + 0.01 * 40 * 4) * 8 / 16 + 0.005 * 60 * 8


class Machine:
    """On which draft steps take `draft` times what the tables say, and so on as `Correction` has it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.truth = Correction()
        monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def round(self, stopwatch: Stopwatch, steps: list[tuple[int, int]], only_decodes: bool = True):
        """What was expected of a round, and what it took."""
        truth, seconds = self.truth, self.truth.draft * DRAFTING * len(steps) / len(STEPS)
        stopwatch.drafted(SLOTS, Launched(steps, seconds))
        self.now += seconds + truth.verify * ALONE
        if steps:
            self.now += truth.drafting * ALONE + truth.drafts * DRAFTS
        return stopwatch.verified(SLOTS, ROWS + ROWS * len(steps), CONTEXTS, only_decodes)


def near(truth: Correction, within: float = 0.01) -> Correction:
    return Correction(*(pytest.approx(value, abs=within) for value in astuple(truth)))


@pytest.mark.parametrize("truth", [Correction(), Correction(1.5, 1.2, 1.0, 0.3), Correction(0.7, 0.8, 0.6, 0.0)])
def test_a_machine_is_learnt_and_forgotten(monkeypatch: pytest.MonkeyPatch, truth: Correction) -> None:
    machine = Machine(monkeypatch)
    stopwatch = Stopwatch(COSTS, DEPTHS, learns=True)
    for machine.truth in (truth, Correction()):
        for _ in range(6 * WATCHED):
            machine.round(stopwatch, [])
        for _ in range(60):
            expected, took = machine.round(stopwatch, STEPS)
        assert expected == pytest.approx(took, rel=0.01)
        assert stopwatch.correction == near(machine.truth, 0.02)


def test_the_tables_are_right_on_the_machine_that_they_are_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts included."""
    machine, stopwatch = Machine(monkeypatch), Stopwatch(COSTS, DEPTHS, learns=True)
    machine.round(stopwatch, [])  # before which there was none
    for steps in ([], STEPS, [], STEPS):
        expected, took = machine.round(stopwatch, steps)
        assert expected == pytest.approx(took)
        assert took == pytest.approx(ALONE + (DRAFTING + DRAFTS) * bool(steps))


def test_a_single_disturbance_moves_little(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, stopwatch = Machine(monkeypatch), Stopwatch(COSTS, DEPTHS, learns=True)
    for _ in range(2 * WATCHED):
        machine.round(stopwatch, [])
    for steps in ([], STEPS):
        machine.truth = Correction(100.0, 100.0, 100.0, 100.0)
        machine.round(stopwatch, steps)
        machine.truth = Correction()
    assert stopwatch.correction == near(Correction(), 0.101)


def test_a_pause_and_a_prompt_are_no_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, stopwatch = Machine(monkeypatch), Stopwatch(COSTS, DEPTHS, learns=True)
    machine.truth = Correction(9.0, 9.0, 9.0, 9.0)
    for _ in range(9):
        assert machine.round(stopwatch, STEPS, only_decodes=False) is None
        # Nor the one that began with it, whose rows did not all draft.
        assert machine.round(stopwatch, STEPS) is None
        stopwatch.drafted(torch.arange(ROWS), Launched(STEPS, 99.0))
        assert stopwatch.verified(SLOTS, 12, CONTEXTS, only_decodes=True) is None
        assert stopwatch.verified(SLOTS, 12, CONTEXTS, only_decodes=True) is None
    assert stopwatch.correction == Correction()


def test_ranks_that_have_to_agree_are_not_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a host that only launches."""
    machine, stopwatch = Machine(monkeypatch), Stopwatch(COSTS, DEPTHS, learns=False)
    machine.truth = Correction(1.5, 1.2, 1.0, 0.3)
    assert not stopwatch.watches
    for _ in range(12):
        found = machine.round(stopwatch, STEPS)
    assert stopwatch.correction == Correction()
    assert found == pytest.approx((ALONE + DRAFTING + DRAFTS, 1.5 * DRAFTING + 1.5 * ALONE + DRAFTS))


def test_what_a_round_without_drafts_takes_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, stopwatch = Machine(monkeypatch), Stopwatch(COSTS, DEPTHS, learns=True)
    watched = []
    for _ in range(WATCHED + 3 * (AGAIN + 1)):
        watched.append(stopwatch.watches)
        machine.round(stopwatch, [] if watched[-1] else STEPS)
    assert watched == [True] * WATCHED + ([False] * AGAIN + [True]) * 3


def test_drafts_begin_where_no_round_can_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As every one has a prompt in it, or other sequences."""
    machine, stopwatch = Machine(monkeypatch), Stopwatch(COSTS, DEPTHS, learns=True)
    for _ in range(WATCHED):
        assert stopwatch.watches
        assert machine.round(stopwatch, [], only_decodes=False) is None
    assert not stopwatch.watches


def test_drafts_stop_on_a_machine_where_they_do_not_pay_and_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a closed loop: the policy drafts by what it learns from what it drafts."""
    machine = Machine(monkeypatch)
    stopwatch, planner = Stopwatch(COSTS, DEPTHS, learns=True), Planner(torch.tensor(DEPTHS), COSTS, LENGTH)
    shadow = ShadowScorer(lambda states: states, lambda states: (states, states), COSTS, 0.0, CPU)  # type: ignore[arg-type]
    policy = DynamicPolicy(DEPTHS, 8, LENGTH, ROWS, shadow, planner, CPU, True, stopwatch)
    monkeypatch.setattr(policy.statistics, "estimate", lambda slots: torch.full((ROWS, 2), 0.8, dtype=torch.float64))
    limit, context = torch.full((ROWS,), LENGTH), torch.full((ROWS,), 100)

    def drafted_in(rounds: int) -> float:
        """The share of rounds that drafted."""
        drafting = 0
        for _ in range(rounds):
            plan = policy.plan(SLOTS, limit, context)
            steps = [(ROWS, plan.deepest)] * int(plan.length.max())
            drafting += bool(steps)
            truth = machine.truth
            tokens = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
            tokens[:, len(steps) :] = -1
            tabled = sum(COSTS.draft_seconds(rows, DEPTHS[exit], CONTEXTS) for rows, exit in steps)
            machine.now += truth.draft * tabled
            policy.record(SLOTS, plan, Drafts(tokens, torch.ones(ROWS, LENGTH)), Launched(steps, truth.draft * tabled))
            verified_tokens = ROWS * (1 + len(steps))
            machine.now += (truth.verify + truth.drafting * bool(steps)) * ALONE
            machine.now += truth.drafts * COSTS.drafts_seconds(ROWS, verified_tokens, CONTEXTS)
            outcome = verified()
            outcome.num_tokens, outcome.contexts = verified_tokens, CONTEXTS
            policy.observe(SLOTS, outcome)
        return drafting / rounds

    assert drafted_in(WATCHED) == 0
    assert drafted_in(200) > 0.9
    machine.truth = Correction(3.0, 1.0, 1.0, 0.5)
    drafted_in(40)
    assert 0 < drafted_in(4000) < 0.03
    machine.truth = Correction()
    drafted_in(2000)
    assert drafted_in(200) > 0.9
