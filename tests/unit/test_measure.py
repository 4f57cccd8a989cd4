"""Costs are measured once, and again where they were measured on a busy machine."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_del.engine import measure
from vllm_del.policy.cost import CostTables, MeasuredCosts

EXITS = [2, 4]

measure_seconds = measure._seconds
MEASURE = measure._measure


class Machine:
    """Whose speed is set: all takes `slower` times as long as it might."""

    steps, at_once, verify_each, context = 3, 2, 1, 40
    head_text = "LM head"

    def __init__(self) -> None:
        self.slower = self.draft_slower = self.verify_slower = 1.0
        self.measured = 0

    def drafting(self, rows: int, exits: int, context: int) -> Any:
        assert (rows, exits, context) == (1, len(EXITS), self.context)
        return lambda: self.slower * self.steps * (0.25 + 4 * self.draft_slower + 0.75)

    def verify(self, tokens: int, each: int, context: int) -> float:
        assert (tokens, each, context) == (1, self.verify_each, self.context)
        return self.slower * self.verify_slower * 16.0

    def measure(self, *_: Any) -> MeasuredCosts:
        self.measured += 1
        return MeasuredCosts(
            step=self.slower * 0.25,
            rows=(1,),
            layer=(self.slower * self.draft_slower,),
            head_rows=(1,),
            head=(self.slower * 0.75,),
            tokens=(1,),
            verify=(self.slower * self.verify_slower * 16.0,),
            context=self.context,
        )


class Rows:
    """A machine on which a verification of several rows takes half a second more where they have different lengths, as
    in graphs for rows of one length: of one token, or of the longest."""

    steps, at_once, verify_each, context, long_context = 3, 2, 4, 40, 80

    def __init__(self, even: bool) -> None:
        self.even = even

    def drafting(self, rows: int, exits: int, context: int) -> Any:
        return lambda: self.steps * (1.0 + exits)

    def head(self, rows: int) -> float:
        return 0.5

    def verify(self, tokens: int, each: int, context: int) -> float:
        rows = -(-tokens // each)
        assert rows <= 8, "there are no more"
        apart = rows > 1 and each > 1 and not (each == self.verify_each and tokens % each == 0)
        return 16.0 + tokens / 8 + 0.5 * (self.even and apart) + 0.001 * rows * context


@pytest.mark.parametrize("even", [False, True])
def test_verifications_of_rows_of_several_lengths(machine: "Machine", even: bool) -> None:
    """Where they run in another way, what is more is a time of its own, and in no table."""
    scheduler = SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=4096)
    config: Any = SimpleNamespace(scheduler_config=scheduler, num_speculative_tokens=3)
    rehearsal: Any = Rows(even)
    measured = MEASURE(config, rehearsal, EXITS)
    # With one row of one token, and its context, which it takes to find out.
    little = 1 / 8 + 0.04
    assert measured.uneven == pytest.approx(0.5 + little if even else 0.0)
    tables = CostTables(measured, 8, 3, torch.device("cpu"))
    for tokens in range(1, 33):
        assert tables.verify_seconds(tokens) == pytest.approx(16.0 + tokens / 8, abs=little if even else 0.03)
    assert MeasuredCosts.from_json(measured.to_json()) == measured


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    machine = Machine()
    group = SimpleNamespace(broadcast_object=lambda value, src: value)
    monkeypatch.setattr(measure, "get_tp_group", lambda: group)
    monkeypatch.setattr(measure, "_path", lambda *_: tmp_path / "vllm_del" / "costs.json")
    monkeypatch.setattr(measure, "_measure", machine.measure)
    monkeypatch.setattr(measure, "_seconds", lambda run, *_, **__: run())
    return machine


def start(machine: Machine) -> MeasuredCosts:
    return measure.costs_of(None, machine, EXITS)  # type: ignore[arg-type]


@pytest.mark.parametrize("then", [0.7, 1.0, 1.4, 3.0])
def test_a_later_start_reads_what_was_measured(machine: Machine, then: float) -> None:
    """Also where the machine is slower by then: what is wrong of that passes."""
    first = start(machine)
    machine.slower = then
    assert start(machine) == first
    assert machine.measured == 1


def test_what_was_measured_on_a_busy_machine_is_measured_again(machine: Machine) -> None:
    machine.slower = 2.0
    start(machine)
    machine.slower = 1.0
    again = start(machine)
    assert again == machine.measure()
    assert start(machine) == again
    assert machine.measured == 3


@pytest.mark.parametrize("part", ["draft_slower", "verify_slower"])
def test_also_if_only_one_part_was(machine: Machine, part: str) -> None:
    setattr(machine, part, 2.0)
    start(machine)
    setattr(machine, part, 1.0)
    assert start(machine) == machine.measure()


def test_ranks_do_as_the_first_one_says(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """They measure together, or wait for each other for ever."""
    machine.slower = 2.0
    first = start(machine)
    machine.slower = 1.0
    fast_enough = SimpleNamespace(broadcast_object=lambda value, src: False if isinstance(value, bool) else value)
    monkeypatch.setattr(measure, "get_tp_group", lambda: fast_enough)
    assert start(machine) == first
    assert machine.measured == 1


def test_a_file_of_something_else_is_measured_over(machine: Machine, tmp_path: Path) -> None:
    first = start(machine)
    (tmp_path / "vllm_del" / "costs.json").write_text("{}")
    assert start(machine) == first
    assert machine.measured == 2


def table(most: int, each: float, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Places measured on a machine that takes `each` seconds for a token."""
    now, visits = 0.0, Counter()

    def seconds(tokens: int, visit: int) -> list[float]:
        nonlocal now
        now += each * tokens
        assert visit == visits[tokens]
        visits[tokens] += 1
        return [tokens / 8]

    monkeypatch.setattr(measure, "_since", lambda begin: now)
    ((done, values),) = measure._tables((seconds, measure._places(most), measure._between()))
    assert values.tolist() == [[place / 8] for place in done]
    assert visits == dict.fromkeys(done, measure.VISITS)
    return done


def test_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the few rows and tokens that most rounds are of; of more, ever fewer."""
    fast = {1: [1], 2: [1, 2], 5: [1, 2, 3, 4, 5], 9: [*range(1, 10)], 40: [*range(1, 9), 12, 16, 24, 32, 40]}
    assert {most: table(most, 0.0, monkeypatch) for most in fast} == fast
    assert list(measure._places(512, factor=4)) == [1, 4, 16, 64, 256, 512]


def test_a_slow_machine_measures_far_first_and_then_what_is_between(monkeypatch: pytest.MonkeyPatch) -> None:
    assert table(256, 1 / 15, monkeypatch) == [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32]
    assert table(256, 1 / 6, monkeypatch) == [1, 2, 3, 4, 5, 8, 16]
    assert table(256, 9.0, monkeypatch) == [1]


def test_some_slow_seconds_change_no_shape(machine: Machine) -> None:
    """They are at some places only, in one visit."""
    runs = 0

    def seconds(of: int, visit: int) -> list[float]:
        nonlocal runs
        runs += 1
        slower = 2.0 if 3 < runs < 9 else 1.0
        return [slower * of, 3 * slower * of]

    two = measure._tables((seconds, [1, 2, 4, 8], [3]), (seconds, [1, 8], []))
    assert [(places, times.tolist()) for places, times in two] == [
        ([1, 2, 3, 4, 8], [[n, 3 * n] for n in (1, 2, 3, 4, 8)]),
        ([1, 8], [[1, 3], [8, 24]]),
    ]


@pytest.mark.parametrize(
    ("each", "only", "by_visit"),
    [(9.0, 1 + 2, [1 + 1, 1]), (0.05, 1 + 5, [1 + 3, 3]), (0.001, 1 + 8, [1 + 4, 4])],
)
def test_how_often_a_time_is_taken(machine: Machine, each: float, only: int, by_visit: list[int]) -> None:
    """The first time of all does not count."""

    def number_of(visit: int | None) -> int:
        times: list[float] = []

        def run() -> float:
            times.append(each if times or visit else 0.9 * each)
            return times[-1]

        assert measure_seconds(run, visit=visit) == each
        return len(times)

    assert number_of(None) == only
    assert [number_of(visit) for visit in range(measure.VISITS)] == by_visit
