"""`advance_rows` in Triton: in one launch what is a dozen small ones in torch, in every draft step."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .reference import NO_TOKEN, PAD_SLOT, Said

ROWS = 128
"""Rows of a program."""

_PAD_SLOT = tl.constexpr(PAD_SLOT)
_NO_TOKEN = tl.constexpr(NO_TOKEN)


def advance_rows(
    positions: torch.Tensor,
    seq_lens: torch.Tensor,
    live: torch.Tensor,
    block_tables: Sequence[torch.Tensor],
    block_sizes: Sequence[int],
    slots: Sequence[torch.Tensor],
    max_model_len: int,
    said: Said | None = None,
) -> None:
    """See the reference. All but the block tables, and what is written down, have their rows side by side."""
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
        *(said or (None,) * len(Said._fields)),
        None if said is None else said.tokens.stride(0),
        None if said is None else said.confidences.stride(0),
        num_rows,
        max_model_len,
        GROUPS=len(slots),
        ROWS=ROWS,
    )


# No other batch, step or round, and not the one that costs are measured with, must be compiled for.
@triton.jit(do_not_specialize=["num_rows", "step", "tokens_stride", "confidences_stride", "max_model_len"])
def _advance(
    positions,
    seq_lens,
    live,
    # per KV cache group
    block_tables,
    strides,
    block_sizes,
    slots,
    # as in `Said`, or None
    token,
    confidence,
    step,
    length,
    stop_below,
    input_ids,
    place,
    tokens,
    confidences,
    tokens_stride,
    confidences_stride,
    num_rows,
    max_model_len,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    position = tl.load(positions + row, mask=is_row, other=0)
    is_live = tl.load(live + row, mask=is_row, other=0) != 0
    if token is not None:
        was_said = tl.load(token + row, mask=is_row, other=0)
        sure = tl.load(confidence + row, mask=is_row, other=0)
        to = tl.load(place + row, mask=is_row, other=0)
        tl.store(tokens + to * tokens_stride + step, tl.where(is_live, was_said, _NO_TOKEN), mask=is_row)
        tl.store(confidences + to * confidences_stride + step, sure, mask=is_row)
        tl.store(input_ids + row, was_said.to(tl.int32), mask=is_row)
        # Not `>=`, which a threshold of NaN would fail.
        doubtful = sure < tl.load(stop_below + row, mask=is_row, other=0)
        is_live = is_live & (doubtful == 0) & (tl.load(length + row, mask=is_row, other=0) > step + 1)
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
