"""The tables of costs: what was measured is there, nothing gets cheaper by being more, and they survive a file."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_del.policy.cost import SHADOW_ROWS, CostTables, MeasuredCosts

CPU = torch.device("cpu")
MEASURED = MeasuredCosts(
    rows=(1, 2, 8),
    step=(0.1, 0.1, 0.2),
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
    assert len(tables.layer) == len(tables.step) == 17
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


@given(step=times, layer=times, head=times, verify=times)
def test_more_work_never_looks_cheaper(step, layer, head, verify) -> None:
    """Whatever a noisy machine measured."""
    tables = CostTables(MeasuredCosts((1, 3, 7), step, layer, (1, 3, 7), head, (1, 5, 9), verify), 12, 4, CPU)
    for table in (tables.step, tables.layer, tables.head, tables.verify):
        assert (table.diff() >= 0).all()
        assert table[0] == 0


def test_a_time_that_more_work_undercuts_is_not_believed() -> None:
    """A first pass that was disturbed must not make all that follows look as dear."""
    measured = replace(MEASURED, tokens=(1, 2, 4, 8), verify=(9.0, 4.0, 5.0, 6.0))
    verify = CostTables(measured, max_rows=4, max_length=1, device=CPU).verify
    assert verify.tolist() == pytest.approx([0, 4, 4, 4.5, 5, 5.25, 5.5, 5.75, 6])


def test_a_file_keeps_them() -> None:
    assert MeasuredCosts.from_json(MEASURED.to_json()) == MEASURED


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '{"rows": [1]}', '{"other": [1]}', "null"])
def test_a_file_of_something_else(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - whatever is said of it
        MeasuredCosts.from_json(text)
