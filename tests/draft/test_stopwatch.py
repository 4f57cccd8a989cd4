"""What the clock says of rounds corrects the tables, where the host sees what the device does."""

from dataclasses import astuple
from types import SimpleNamespace

import pytest
import torch

from tests.draft.test_pace import verified
from vllm_del.draft import clock
from vllm_del.draft.clock import AGAIN, LAST, Stopwatch
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
# The four last tokens, and eight drafts with them.
ALONE = 16.0 - 0.01 * 40 * 4 + 0.01 * CONTEXTS
WITH_DRAFTS = 16.0 + 8.0 * 8 / 16 - 0.01 * 40 * 12 + 0.01 * CONTEXTS + 0.005 * 60 * 8


@pytest.fixture(autouse=True)
def nothing_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    COSTS.correction = Correction()
    monkeypatch.setattr(clock, "RELEARN", 1)


class Machine:
    """On which draft steps take `draft` times what the tables say, and so on as `Correction` has it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        # What scoring takes in each round, and has taken
        self.scoring = self.scored = 0.0
        self.truth = Correction()
        monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(clock, "USUAL_STEP_OVERHEAD", 1e-9)

    def round(self, stopwatch: Stopwatch, steps: list[tuple[int, int]], only_decodes: bool = True):
        """What was expected of a round, and what it took."""
        seconds = self.truth.draft * (DRAFTING if steps else 0.0) + self.truth.step * len(steps)
        self.scored += self.scoring
        stopwatch.drafted(SLOTS, Launched(steps, seconds), self.scored)
        self.now += seconds + self.scoring + self.truth.verify * (WITH_DRAFTS if steps else ALONE) + self.truth.overhead
        return stopwatch.verified(SLOTS, ROWS + ROWS * len(steps), CONTEXTS, only_decodes)


def near(truth: Correction) -> Correction:
    return Correction(*(pytest.approx(value) for value in astuple(truth)))


@pytest.mark.parametrize(
    ("truth", "usual_overhead", "usual_step"),
    [
        # of a small model, beside whose rounds, or steps, an overhead is much
        (Correction(1.5, 1.0, 4.0), 1e6, 1e-9),
        (Correction(1.0, 1.0, 4.0, 2.0), 1e6, 1e9),
        (Correction(1.3, 1.3, 0.0, 2.0), 1e-6, 1e9),
        (Correction(1.5, 1.3), 1e-6, 1e-9),
        (Correction(0.7, 0.8), 1.0, 1.0),
        (Correction(2.0), 1.0, 1e-9),
    ],
)
def test_a_machine_is_learnt_and_forgotten(
    monkeypatch: pytest.MonkeyPatch, truth: Correction, usual_overhead: float, usual_step: float
) -> None:
    machine = Machine(monkeypatch)
    monkeypatch.setattr(clock, "USUAL_OVERHEAD", usual_overhead)
    monkeypatch.setattr(clock, "USUAL_STEP_OVERHEAD", usual_step)
    stopwatch = Stopwatch(COSTS, DEPTHS, learns=True)
    machine.round(stopwatch, [])  # before which there was none
    for machine.truth in (Correction(), truth, Correction()):
        for _ in range(LAST):
            expected, took = machine.round(stopwatch, STEPS)
        assert expected == pytest.approx(took)
        assert COSTS.correction == near(machine.truth)
    expected, took = machine.round(stopwatch, [])
    assert expected == pytest.approx(took) == pytest.approx(ALONE)


def test_a_pause_is_no_part_of_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, stopwatch = Machine(monkeypatch), Stopwatch(COSTS, DEPTHS, learns=True)
    for _ in range(1 + LAST):
        machine.round(stopwatch, STEPS)
    # Made within `round`, after the drafts: between them and the verification.
    drafted = stopwatch.drafted
    for _ in range(LAST):
        stopwatch.drafted = lambda *args: (drafted(*args), stopwatch.pause())  # type: ignore[method-assign]
        machine.now += 1000.0
        assert machine.round(stopwatch, STEPS) is None
        stopwatch.drafted = drafted  # type: ignore[method-assign]
        expected, took = machine.round(stopwatch, STEPS)
        assert expected == pytest.approx(took)


def test_what_was_learnt_can_be_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the rounds before count for nothing, and later ones as at first."""
    machine, stopwatch = Machine(monkeypatch), Stopwatch(COSTS, DEPTHS, learns=True)
    machine.truth = Correction(4.0, 3.0)
    for _ in range(1 + LAST):
        machine.round(stopwatch, STEPS)
    assert COSTS.correction.verify > 2
    stopwatch.forget()
    assert COSTS.correction == Correction()
    machine.truth = Correction()
    machine.round(stopwatch, STEPS)
    assert COSTS.correction == near(Correction())


def test_what_is_beyond_the_table_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both are as usual, half of it is overhead; what was expected is what it took all the same."""
    monkeypatch.setattr(clock, "USUAL_OVERHEAD", clock.USUAL_FACTOR * WITH_DRAFTS)
    machine, stopwatch = Machine(monkeypatch), Stopwatch(COSTS, DEPTHS, learns=True)
    machine.truth = Correction(1.0, 1.0, 3.0)
    for _ in range(1 + LAST):
        machine.round(stopwatch, STEPS)
    assert COSTS.correction == near(Correction(1.0, 1 + 1.5 / WITH_DRAFTS, 1.5))
    expected, took = machine.round(stopwatch, STEPS)
    assert expected == pytest.approx(took)


def test_scoring_is_no_part_of_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it may take is a share of that, and must not grow by what it takes."""
    machine, stopwatch = Machine(monkeypatch), Stopwatch(COSTS, DEPTHS, learns=True)
    for machine.scoring in (0.5, 3.0):
        for _ in range(1 + LAST):
            machine.round(stopwatch, STEPS)
        assert COSTS.correction == near(Correction())


def test_overhead_of_shallow_drafts_is_that_of_deep_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step takes beside its layers, whatever the exit, does not make deep ones look dear."""
    machine, stopwatch = Machine(monkeypatch), Stopwatch(COSTS, DEPTHS, learns=True)
    shallow = COSTS.draft_seconds(ROWS, DEPTHS[0], CONTEXTS)
    monkeypatch.setattr(clock, "USUAL_STEP_OVERHEAD", 2 * clock.USUAL_FACTOR * shallow)
    slower, beside = 1.1, 0.4 * shallow
    for _ in range(1 + LAST):
        stopwatch.drafted(SLOTS, Launched([(ROWS, 0)] * 2, 2 * (slower * shallow + beside)), 0.0)
        machine.now += 2 * (slower * shallow + beside) + WITH_DRAFTS
        stopwatch.verified(SLOTS, 3 * ROWS, CONTEXTS, True)
    assert COSTS.correction == near(Correction(slower, 1.0, 0.0, beside))
    planner = Planner(torch.tensor(DEPTHS), COSTS, LENGTH)
    context, rates = torch.full((ROWS,), 100), torch.tensor([[0.0, 0.9]] * ROWS, dtype=torch.float64)
    decision = planner.plan(rates, torch.full((ROWS,), 2), context)
    assert decision.length.tolist() == [2] * ROWS
    deep = COSTS.draft_seconds(ROWS, DEPTHS[1], CONTEXTS)
    # With what the verification takes for the context of the drafts.
    of_context = COSTS.token_context * 60 * 2 * ROWS
    assert float(decision.draft_time) == pytest.approx(2 * (slower * deep + beside) + of_context)


def test_exits_tell_what_goes_by_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables have layers too dear, as measured on a busy machine: steps to both exits are known for what they take."""
    machine, stopwatch = Machine(monkeypatch), Stopwatch(COSTS, DEPTHS, learns=True)
    monkeypatch.setattr(clock, "USUAL_STEP_OVERHEAD", 0.5)
    shallow, deep = (COSTS.draft_seconds(ROWS, depth, CONTEXTS) for depth in DEPTHS)
    took = {0: 0.6 * shallow, 1: 0.6 * shallow + 0.25 * (deep - shallow)}
    for place in range(LAST):
        exit = int(place % 3 > 0)
        # Some rounds take longer, at either exit.
        seconds = took[exit] * (1.5 if place % 7 == 0 else 1.0)
        stopwatch.drafted(SLOTS, Launched([(ROWS, exit)] * 2, 2 * seconds), 0.0)
        machine.now += 2 * seconds + WITH_DRAFTS
        stopwatch.verified(SLOTS, 3 * ROWS, CONTEXTS, True)
    of = COSTS.correction
    assert of.draft * shallow + of.step == pytest.approx(took[0], rel=0.1)
    assert of.draft * deep + of.step == pytest.approx(took[1], rel=0.05)
    assert of.draft < 0.45


def test_steps_to_several_exits_are_forgotten_as_those_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once more rounds went without drafts than with, they are as fast as verification at any exit."""
    machine, stopwatch = Machine(monkeypatch), Stopwatch(COSTS, DEPTHS, learns=True)
    monkeypatch.setattr(clock, "USUAL_STEP_OVERHEAD", 0.5)
    seconds = [COSTS.draft_seconds(ROWS, depth, CONTEXTS) for depth in DEPTHS]
    for place in range(LAST):
        exit = int(place % 3 > 0)
        stopwatch.drafted(SLOTS, Launched([(ROWS, exit)] * 2, 6 * seconds[exit]), 0.0)
        machine.now += 6 * seconds[exit] + WITH_DRAFTS
        stopwatch.verified(SLOTS, 3 * ROWS, CONTEXTS, True)
    of = COSTS.correction
    assert [of.draft * tabled + of.step for tabled in seconds] == pytest.approx([3 * s for s in seconds], rel=0.1)
    for _ in range(AGAIN * (LAST // 2 + 1)):
        machine.round(stopwatch, [])
    assert of.step < 0.1 * seconds[0]
    assert [of.draft * tabled + of.step for tabled in seconds] == pytest.approx(seconds, rel=0.1)


def test_tables_are_corrected_every_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """By all the rounds since."""
    machine, stopwatch = Machine(monkeypatch), Stopwatch(COSTS, DEPTHS, learns=True)
    monkeypatch.setattr(clock, "RELEARN", 5)
    machine.truth = Correction(1.5, 1.3)
    machine.round(stopwatch, STEPS)  # before which there was none
    corrected = []
    for _ in range(2 * LAST):
        before = astuple(COSTS.correction)
        machine.round(stopwatch, STEPS)
        corrected.append(astuple(COSTS.correction) != before)
    assert not any(changed for place, changed in enumerate(corrected, 1) if place % 5)
    assert any(corrected)
    assert COSTS.correction.draft == pytest.approx(1.5, rel=0.01)


def test_single_disturbances_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the first rounds either."""
    machine, stopwatch = Machine(monkeypatch), Stopwatch(COSTS, DEPTHS, learns=True)
    for place in range(60):
        machine.truth = Correction(100.0, 1.0, 1000.0) if place % 5 < 2 else Correction()
        machine.round(stopwatch, STEPS)
        assert COSTS.correction == near(Correction())


@pytest.mark.parametrize("usual_step", [1e-9, 1.0])
@pytest.mark.parametrize("verify", [0.8, 1.5])
def test_what_was_learnt_of_drafts_is_forgotten_where_nothing_is_drafted(
    monkeypatch: pytest.MonkeyPatch, verify: float, usual_step: float
) -> None:
    machine, stopwatch = Machine(monkeypatch), Stopwatch(COSTS, DEPTHS, learns=True)
    # All that verification takes longer is in proportion, whatever a step takes beside the tables.
    monkeypatch.setattr(clock, "USUAL_OVERHEAD", 1e-9)
    monkeypatch.setattr(clock, "USUAL_STEP_OVERHEAD", usual_step)
    machine.truth = Correction(3.0, verify)
    for _ in range(1 + LAST):
        machine.round(stopwatch, STEPS)
    learnt, rounds = astuple(COSTS.correction), 0
    while COSTS.correction.draft > verify + 1e-6 or COSTS.correction.step > 1e-6:
        assert astuple(COSTS.correction) == pytest.approx(learnt)
        machine.round(stopwatch, [])
        rounds += 1
    assert COSTS.correction == near(Correction(verify, verify))
    assert rounds == AGAIN * (LAST // 2 + 1)


def test_without_drafts_they_are_as_fast_as_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is fast, or slow, in everything keeps no drafts away."""
    machine, stopwatch = Machine(monkeypatch), Stopwatch(COSTS, DEPTHS, learns=True)
    monkeypatch.setattr(clock, "USUAL_OVERHEAD", 1e-9)
    for machine.truth in (Correction(9.0, 0.7), Correction(9.0, 1.5)):
        for _ in range(1 + LAST):
            machine.round(stopwatch, [])
        assert COSTS.correction == near(Correction(machine.truth.verify, machine.truth.verify))


def test_a_pause_and_a_prompt_are_no_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, stopwatch = Machine(monkeypatch), Stopwatch(COSTS, DEPTHS, learns=True)
    machine.truth = Correction(9.0, 1.0, 9.0)
    for _ in range(9):
        assert machine.round(stopwatch, STEPS, only_decodes=False) is None
        # Nor the one that began with it, whose rows did not all draft.
        assert machine.round(stopwatch, STEPS) is None
        stopwatch.drafted(torch.arange(ROWS), Launched(STEPS, 99.0), 0.0)
        assert stopwatch.verified(SLOTS, 12, CONTEXTS, only_decodes=True) is None
        assert stopwatch.verified(SLOTS, 12, CONTEXTS, only_decodes=True) is None
    assert COSTS.correction == Correction()


def test_ranks_that_have_to_agree_are_not_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a host that only launches."""
    machine, stopwatch = Machine(monkeypatch), Stopwatch(COSTS, DEPTHS, learns=False)
    machine.truth = Correction(1.5, 1.0, 4.0)
    for _ in range(12):
        found = machine.round(stopwatch, STEPS)
    assert COSTS.correction == Correction()
    assert found == pytest.approx((DRAFTING + WITH_DRAFTS, 1.5 * DRAFTING + WITH_DRAFTS + 4.0))


def test_drafts_stop_on_a_machine_where_they_do_not_pay_and_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a closed loop: the policy drafts by what it learns from what it drafts."""
    machine = Machine(monkeypatch)
    stopwatch, planner = Stopwatch(COSTS, DEPTHS, learns=True), Planner(torch.tensor(DEPTHS), COSTS, LENGTH)
    shadow = ShadowScorer(lambda states: states, *[lambda states: (states, states)] * 2, COSTS, 0.0, CPU)  # type: ignore[arg-type]
    policy = DynamicPolicy(DEPTHS, 8, LENGTH, ROWS, shadow, planner, CPU, True, stopwatch)
    monkeypatch.setattr(policy.statistics, "estimate", lambda slots: torch.full((len(slots), 2), 0.8).double())
    limit, context = torch.full((ROWS,), LENGTH), torch.full((ROWS,), 100)

    def drafted_in(rounds: int) -> float:
        """The share of rounds that drafted."""
        drafting = 0
        for _ in range(rounds):
            plan = policy.plan(SLOTS, limit, limit, context)
            steps = [(ROWS, plan.deepest)] * int(plan.length.max())
            drafting += bool(steps)
            tokens = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
            tokens[:, len(steps) :] = -1
            seconds = machine.truth.draft * sum(COSTS.draft_seconds(r, DEPTHS[e], CONTEXTS) for r, e in steps)
            policy.record(SLOTS, plan, Drafts(tokens, torch.ones(ROWS, LENGTH)), Launched(steps, seconds))
            outcome = verified()
            outcome.num_tokens, outcome.contexts = ROWS * (1 + len(steps)), CONTEXTS
            tabled = COSTS.round_seconds(ROWS, outcome.num_tokens, CONTEXTS)
            machine.now += seconds + machine.truth.verify * tabled + machine.truth.overhead
            policy.observe(SLOTS, outcome)
        return drafting / rounds

    assert drafted_in(200) > 0.9
    machine.truth = Correction(4.0)
    drafted_in(40)
    assert 0 < drafted_in(4000) < 0.2
    machine.truth = Correction()
    drafted_in(200)
    assert drafted_in(200) > 0.9
