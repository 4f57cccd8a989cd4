"""`exit_rows` in Triton: reads and writes the rows that leave, and no other."""

import torch
import triton
import triton.language as tl

BLOCK = 1024
"""Elements that a program copies."""


def exit_rows(states: torch.Tensor, exit: torch.Tensor, index: int, taken: torch.Tensor) -> None:
    """See the reference. Elements of a row lie side by side."""
    num_rows, hidden_size = states.shape
    if num_rows:
        grid = num_rows, triton.cdiv(hidden_size, BLOCK)
        _copy[grid](states, exit, index, taken, states.stride(0), taken.stride(0), hidden_size, BLOCK=BLOCK)


@triton.jit(do_not_specialize=["index"])
def _copy(states, exit, index, taken, states_stride, taken_stride, hidden_size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(exit + row) == index:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(states + row * states_stride + at, mask=at < hidden_size)
        tl.store(taken + row * taken_stride + at, values, mask=at < hidden_size)
