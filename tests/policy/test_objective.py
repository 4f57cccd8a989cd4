"""Closed forms against enumeration, and the best choice against trying all of them."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_del.policy.objective import best_by_tokens_per_layer, expected_tokens, tokens_per_layer

RATES = st.floats(0, 1)


def enumerated_tokens(rate: float, length: int) -> float:
    """Every pattern of drafts that would match or not, its probability, and the tokens it yields."""
    total = 0.0
    for pattern in product([True, False], repeat=length):
        probability = 1.0
        for matches in pattern:
            probability *= rate if matches else 1 - rate
        accepted = next((i for i, matches in enumerate(pattern) if not matches), length)
        total += probability * (accepted + 1)
    return total


@given(rate=RATES, length=st.integers(0, 8))
def test_expected_tokens(rate: float, length: int) -> None:
    tokens = expected_tokens(torch.tensor([rate], dtype=torch.float64), length)
    assert tokens.shape == (1, length + 1)
    assert tokens[0].tolist() == pytest.approx([enumerated_tokens(rate, d) for d in range(length + 1)])


def test_expected_tokens_at_the_ends() -> None:
    tokens = expected_tokens(torch.tensor([0.0, 1.0]), 3)
    assert tokens.tolist() == [[1, 1, 1, 1], [1, 2, 3, 4]]


def test_tokens_per_layer_of_the_formula() -> None:
    """(1 + 0.5 + 0.25) / (2 * 3 + 8)"""
    values = tokens_per_layer(torch.tensor([0.5]), torch.tensor([3]), num_layers=8, max_length=4)
    assert values[0, 2].item() == pytest.approx(1.75 / 14)
    assert values[0, 0].item() == pytest.approx(1 / 8)


@given(
    rates=st.lists(st.one_of(RATES, st.sampled_from([0.0, 0.25, 0.5, 1.0, float("nan")])), min_size=1, max_size=6),
    extra=st.integers(1, 6),
    max_length=st.integers(0, 9),
)
def test_best_is_the_first_of_the_largest(rates: list[float], extra: int, max_length: int) -> None:
    depths = list(range(1, len(rates) + 1))
    num_layers = len(rates) + extra
    exit_, length = best_by_tokens_per_layer(
        torch.tensor(rates, dtype=torch.float64), torch.tensor(depths), num_layers, max_length
    )
    values = tokens_per_layer(torch.tensor(rates, dtype=torch.float64), torch.tensor(depths), num_layers, max_length)
    best, found = -1.0, (0, 0)
    for index, row in enumerate(values.tolist()):
        for d, value in enumerate(row):
            if value > best:  # never of NaN
                best, found = value, (index, d)
    assert (exit_.item(), length.item()) == found


@given(rate=RATES, depth=st.integers(1, 11))
def test_drafting_pays_by_layers_if_the_rate_is_above_the_share_of_layers(rate: float, depth: int) -> None:
    """alpha > E / L (DEL's objective): then one draft is better than none, and else no number is."""
    threshold = depth / 12
    _, length = best_by_tokens_per_layer(torch.tensor([rate], dtype=torch.float64), torch.tensor([depth]), 12, 17)
    if rate > threshold + 1e-9:
        assert length > 0
    elif rate < threshold - 1e-9:
        assert length == 0


def test_every_row_is_chosen_for_by_itself() -> None:
    rates = torch.tensor([[0.9, 0.95], [0.1, 0.99], [0.0, 0.1]])
    exit_, length = best_by_tokens_per_layer(rates, torch.tensor([2, 6]), 12, 17)
    for row in range(3):
        alone = best_by_tokens_per_layer(rates[row], torch.tensor([2, 6]), 12, 17)
        assert (exit_[row], length[row]) == alone
    assert exit_.tolist()[:2] == [0, 1]
    assert length[2] == 0
