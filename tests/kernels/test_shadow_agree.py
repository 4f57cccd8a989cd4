"""`shadow_agree`: the kernel against the reference, and the reference against what torch says."""

from typing import Any

import pytest
import torch
from vllm_del.kernels.shadow_agree import reference

from tests.kernels.conftest import OnTriton
from tests.kernels.test_exit_head import numbers, whole_numbers


def expected_of(logits: torch.Tensor, first_token: int = 0) -> torch.Tensor:
    """The best token of every other row, and of the rest one beside it."""
    return logits.argmax(1) + first_token + torch.arange(len(logits)) % 2


def check(device: str, states: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, options: dict) -> Any:
    from vllm_del.kernels.shadow_agree import triton

    agrees, probability = reference.shadow_agree(states, weight, target, **options)
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    torch.use_deterministic_algorithms(True)  # fills what `empty` gives with NaN
    try:
        given = triton.shadow_agree(states.to(device), weight.to(device), target.to(device), **moved)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(given[0].cpu(), agrees)
    torch.testing.assert_close(given[1].cpu(), probability, rtol=1e-5, atol=1e-6, equal_nan=True)
    return agrees, probability


@pytest.mark.parametrize(
    ("pairs", "vocabulary", "hidden"), [(0, 70, 16), (1, 1, 1), (5, 777, 37), (200, 300, 24), (1100, 70, 4)]
)
def test_float32(on_triton: OnTriton, pairs: int, vocabulary: int, hidden: int) -> None:
    """Of more pairs than a program computes together too, and of more than one merges."""
    states, weight = numbers(pairs, hidden), numbers(vocabulary, hidden, seed=1)
    logits = states @ weight.T
    agrees, probability = on_triton(check, states, weight, expected_of(logits), {})
    assert agrees.tolist() == [pair % 2 == 0 for pair in range(pairs)]
    torch.testing.assert_close(probability, logits.softmax(1).amax(1))


def test_norm_shortlist_and_soft_cap(on_triton: OnTriton) -> None:
    shortlist = torch.arange(3, 400, 3)
    states, weight, norm = numbers(40, 24), numbers(400, 24, seed=1), numbers(24, seed=2)
    logits = torch.nn.functional.rms_norm(states, (24,), norm, 1e-5) @ weight[shortlist].T
    target = torch.where(torch.arange(40) % 2 == 0, shortlist[logits.argmax(1)], 5)
    options = {"norm_weight": norm, "epsilon": 1e-5, "shortlist": shortlist, "soft_cap": 30.0}
    agrees, _ = on_triton(check, states, weight, target, options)
    assert agrees.tolist() == [pair % 2 == 0 for pair in range(40)]


def test_fp8_head(on_triton: OnTriton) -> None:
    weight = numbers(300, 48, seed=1)
    scales = weight.abs().amax(1) / torch.finfo(torch.float8_e4m3fn).max
    rounded = (weight / scales.unsqueeze(1)).to(torch.float8_e4m3fn)
    target = expected_of(numbers(20, 48) @ (rounded.float() * scales.unsqueeze(1)).T)
    agrees, _ = on_triton(check, numbers(20, 48), rounded, target, {"row_scales": scales})
    assert agrees.sum() == 10


def test_only_the_first_of_equals_agrees(on_triton: OnTriton) -> None:
    states, weight = whole_numbers(60, 4), whole_numbers(400, 4, seed=1)
    logits = states @ weight.T
    last = 399 - logits.flip(1).argmax(1)
    agrees, _ = on_triton(check, states, weight, last, {})
    assert torch.equal(agrees, last == logits.argmax(1))
    assert not agrees.all()


def test_broken_rows_harm_no_others(on_triton: OnTriton) -> None:
    """NaN is larger than anything, as torch has it; a row of nothing but -inf says its first token."""
    states, weight = numbers(6, 8).abs(), numbers(200, 8, seed=1)
    states[1], weight[:, 0], weight[77, 0] = torch.nan, -torch.inf, 1.0
    agrees, probability = on_triton(check, states, weight, torch.tensor([77, 0, 77, 0, 77, 76]), {})
    assert agrees.tolist() == [True, True, True, False, True, False]
    assert probability.isnan().tolist() == [False, True, False, False, False, False]
