"""Predictions against the arithmetic of one sequence."""

import pytest

from vllm_del.policy.cost import Correction, MeasuredCosts
from vllm_del.policy.predict import predict

COSTS = MeasuredCosts(
    step=0.0,
    rows=(1, 64),
    layer=(1.0, 2.0),
    head_rows=(1, 512),
    head=(1.0, 2.0),
    tokens=(1, 64, 448),
    verify=(16.0, 32.0, 200.0),
)


def test_one_sequence() -> None:
    """At rate 0.9 a draft of d tokens after 3 layers costs 4 d, and yields 0.9 + 0.9^2 + ..."""
    found = predict(COSTS, [3, 8], [0.9, 0.91], 6, batch=1, context=100)
    goodput = {d: sum(0.9**k for k in range(d + 1)) / (16.0 + 16 / 63 * d + 4 * d) for d in range(7)}
    assert found.depth == 3
    assert goodput[found.length] == pytest.approx(max(goodput.values()), rel=0.01)
    assert found.best == pytest.approx(goodput[found.length], rel=0.01)
    assert found.without == pytest.approx(1 / 16)
    assert found.speed_up == pytest.approx(found.best * 16)


def test_what_the_clock_says_of_the_costs() -> None:
    """A round takes a second beside twice its verification, and drafts take thrice what is tabled."""
    found = predict(COSTS, [3], [0.9], 6, batch=1, context=100, correction=Correction(3.0, 2.0, 1.0, 0.5))
    goodput = {
        d: sum(0.9**k for k in range(d + 1)) / (2 * (16.0 + 16 / 63 * d) + 1 + d * (3 * 4 + 0.5)) for d in range(7)
    }
    assert found.without == pytest.approx(1 / 33)
    assert goodput[found.length] == pytest.approx(max(goodput.values()), rel=0.01)
    assert found.best == pytest.approx(goodput[found.length], rel=0.01)


def test_where_it_does_not_pay() -> None:
    found = predict(COSTS, [3, 8], [0.1, 0.2], 6, batch=4, context=100)
    assert (found.depth, found.length, found.speed_up) == (0, 0, pytest.approx(1.0))


def test_a_large_batch_gains_less() -> None:
    ups = [predict(COSTS, [3, 8], [0.9, 0.92], 6, batch, context=100).speed_up for batch in (1, 4, 16, 64)]
    assert ups == sorted(ups, reverse=True)
    assert ups[0] > 1.5
