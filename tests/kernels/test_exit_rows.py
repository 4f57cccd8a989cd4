"""`exit_rows`: the kernel against the reference, and the reference against a loop."""

import pytest
import torch
from vllm_del.kernels.exit_rows import reference

from tests.kernels.conftest import OnTriton

SIZES = [(0, 8), (1, 1), (1, 1024), (7, 33), (130, 1025), (3, 4096)]


def inputs(rows: int, hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of a wider tensor; what was there is NaN, and what does not leave is too: neither may be touched."""
    generator = torch.Generator().manual_seed(rows * hidden)
    exit = torch.randint(0, 3, (rows,), generator=generator)
    states = torch.randn(rows, hidden + 5, generator=generator).to(dtype)[:, :hidden]
    states[exit != 1] = torch.nan
    return states, exit, torch.full((rows, hidden + 3), torch.nan, dtype=dtype)[:, :hidden]


def check(device: str, rows: int, hidden: int, dtype: torch.dtype) -> None:
    from vllm_del.kernels.exit_rows import triton

    states, exit, taken = inputs(rows, hidden, dtype)
    expected = taken.clone()
    reference.exit_rows(states, exit, 1, expected)
    given = taken.to(device)
    triton.exit_rows(states.to(device), exit.to(device), 1, given)
    torch.testing.assert_close(given.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("rows", "hidden"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel(on_triton: OnTriton, rows: int, hidden: int, dtype: torch.dtype) -> None:
    on_triton(check, rows, hidden, dtype)


@pytest.mark.parametrize(("rows", "hidden"), SIZES)
def test_reference(rows: int, hidden: int) -> None:
    states, exit, taken = inputs(rows, hidden, torch.float32)
    reference.exit_rows(states, exit, 1, taken)
    for row in range(rows):
        assert torch.equal(taken[row], states[row]) if exit[row] == 1 else taken[row].isnan().all()


def check_beyond_31_bits(device: str) -> None:
    """Rows that lie 2^26 elements apart: only the pages that are read take memory."""
    from vllm_del.kernels.exit_rows import triton

    stride, rows, hidden = 2**26, 40, 16
    memory = torch.zeros(stride * (rows - 1) + hidden, dtype=torch.float8_e4m3fn, device=device)
    states = memory.as_strided((rows, hidden), (stride, 1))
    states.copy_(torch.randn(rows, hidden).to(torch.float8_e4m3fn))
    assert memory.numel() > 2**31
    taken = torch.zeros(rows, hidden, dtype=torch.float8_e4m3fn, device=device)
    triton.exit_rows(states, torch.ones(rows, dtype=torch.int64, device=device), 1, taken)
    assert torch.equal(taken.float(), states.float())


def test_states_of_more_than_31_bits(on_triton: OnTriton) -> None:
    on_triton(check_beyond_31_bits)
