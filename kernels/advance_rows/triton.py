"""`advance_rows` in Triton: in one launch what is a dozen small ones in torch, in every draft step."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .reference import PAD_SLOT

ROWS = 128
"""Rows of a program."""

_PAD_SLOT = tl.constexpr(PAD_SLOT)


def advance_rows(
    positions: torch.Tensor,
    seq_lens: torch.Tensor,
    live: torch.Tensor,
    block_tables: Sequence[torch.Tensor],
    block_sizes: Sequence[int],
    slots: Sequence[torch.Tensor],
    max_model_len: int,
) -> None:
    """See the reference. All but the block tables have their rows side by side."""
    if not len(block_tables) == len(block_sizes) == len(slots):
        raise ValueError(f"{len(block_tables)} block tables, {len(block_sizes)} block sizes, {len(slots)} slots")
    num_rows = len(positions)
    if num_rows == 0:
        return
    _advance[(triton.cdiv(num_rows, ROWS),)](
        positions,
        seq_lens,
        live,
        tuple(block_tables),
        tuple(table.stride(0) for table in block_tables),
        tuple(block_sizes),
        tuple(slots),
        num_rows,
        max_model_len,
        GROUPS=len(slots),
        ROWS=ROWS,
    )


# Batches of other sizes must not be compiled for while serving.
@triton.jit(do_not_specialize=["num_rows"])
def _advance(
    positions,
    seq_lens,
    live,
    # per KV cache group
    block_tables,
    strides,
    block_sizes,
    slots,
    num_rows,
    max_model_len,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    position = tl.load(positions + row, mask=is_row, other=0)
    is_live = tl.load(live + row, mask=is_row, other=0) != 0
    position += is_live.to(tl.int64)
    is_live = is_live & (position < max_model_len)
    position = tl.minimum(tl.maximum(position, 0), max_model_len - 1)
    tl.store(positions + row, position, mask=is_row)
    tl.store(live + row, is_live, mask=is_row)
    tl.store(seq_lens + row, tl.where(is_live, position + 1, 1).to(tl.int32), mask=is_row)
    for group in tl.static_range(GROUPS):
        size = block_sizes[group]
        table_row = block_tables[group] + row.to(tl.int64) * strides[group]
        block = tl.load(table_row + position // size, mask=is_row, other=0).to(tl.int64)
        slot = tl.where(is_live, block * size + position % size, _PAD_SLOT)
        tl.store(slots[group] + row, slot, mask=is_row)
