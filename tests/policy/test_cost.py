"""The tables of costs: what was measured is there, nothing gets cheaper by being more, and they survive a file."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_del.policy.cost import SHADOW_ROWS, CostTables, MeasuredCosts, split_steps

CPU = torch.device("cpu")
MEASURED = MeasuredCosts(
    step=0.1,
    rows=(1, 2, 8),
    layer=(1.0, 1.2, 1.8),
    head_rows=(1, 2, 8),
    head=(2.0, 2.0, 2.6),
    tokens=(1, 4, 16),
    verify=(10.0, 11.0, 17.0),
)


def test_measured_places_and_what_is_between_and_beyond() -> None:
    tables = CostTables(MEASURED, max_rows=16, max_length=3, device=CPU)
    assert tables.layer.tolist()[:9] == pytest.approx([0, 1.0, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8])
    assert float(tables.layer[16]) == pytest.approx(2 * 1.8)
    assert tables.step.tolist() == [0.0, *[0.1] * 16]
    assert len(tables.layer) == 17
    assert len(tables.head) == SHADOW_ROWS + 1
    assert len(tables.verify) == 16 * 4 + 1
    assert float(tables.verify[10]) == pytest.approx(14.0)
    assert float(tables.verify[64]) == pytest.approx(4 * 17.0)
    assert tables.verify_seconds(10) == pytest.approx(14.0)
    assert tables.verify_seconds(6400) == pytest.approx(400 * 17.0)


def test_head_rows_is_the_most_that_can_be_paid() -> None:
    tables = CostTables(MEASURED, max_rows=4, max_length=3, device=CPU)
    for seconds in np.linspace(0, 20, 77):
        rows = tables.head_rows(seconds)
        assert rows == 0 or tables.head_seconds(rows) <= seconds
        assert rows == SHADOW_ROWS or tables.head_seconds(rows + 1) > seconds


times = st.lists(st.floats(0, 1e3), min_size=3, max_size=3).map(tuple)


@given(shallow=times, deep=times, head=times, verify=times)
def test_more_work_never_looks_cheaper(shallow, deep, head, verify) -> None:
    """Whatever a noisy machine measured."""
    step, layer = split_steps(shallow, deep, [2, 6])
    costs = MeasuredCosts(step, (1, 3, 7), tuple(layer), (1, 3, 7), head, (1, 5, 9), verify)
    tables = CostTables(costs, 12, 4, CPU)
    for table in (tables.step, tables.layer, tables.head, tables.verify):
        assert (table.diff() >= 0).all()
        assert table[0] == 0


def test_a_time_that_more_work_undercuts_is_not_believed() -> None:
    """A first pass that was disturbed must not make all that follows look as dear."""
    measured = replace(MEASURED, tokens=(1, 2, 4, 8), verify=(9.0, 4.0, 5.0, 6.0))
    verify = CostTables(measured, max_rows=4, max_length=1, device=CPU).verify
    assert verify.tolist() == pytest.approx([0, 4, 4, 4.5, 5, 5.25, 5.5, 5.75, 6])


def test_draft_steps_are_split_into_layers_and_the_rest() -> None:
    layers = (1.0, 1.0, 1.5)
    shallow, deep = ([0.4 + depth * layer for layer in layers] for depth in (2, 6))
    step, layer = split_steps(shallow, deep, [2, 4, 6])
    assert step == pytest.approx(0.4)
    assert layer == pytest.approx(layers)
    assert split_steps(deep, deep, [6]) == (0.0, pytest.approx([seconds / 6 for seconds in deep]))


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_noise_in_a_step_is_not_lost_from_its_layers(noise: float) -> None:
    """Whatever the split makes of it, a deep step costs what it was measured to cost."""
    shallow, deep = [2.4, 2.4 + noise, 3.4], [6.4, 6.4, 9.4]
    step, layer = split_steps(shallow, deep, [2, 6])
    assert step == pytest.approx(0.4)
    assert [step + 6 * seconds for seconds in layer] == pytest.approx(deep)


def test_a_file_keeps_them() -> None:
    assert MeasuredCosts.from_json(MEASURED.to_json()) == MEASURED


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '{"rows": [1]}', '{"other": [1]}', "null"])
def test_a_file_of_something_else(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - whatever is said of it
        MeasuredCosts.from_json(text)
