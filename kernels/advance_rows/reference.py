"""`advance_rows` in plain torch."""

from collections.abc import Sequence

import torch

PAD_SLOT = -1
"""The slot that no KV is written to (vLLM's `PAD_SLOT_ID`)."""


def advance_rows(
    # [rows] int64, in and out
    positions: torch.Tensor,
    # [rows] int32, out
    seq_lens: torch.Tensor,
    # [rows] bool, in and out
    live: torch.Tensor,
    # per KV cache group: [rows, max_blocks] int32
    block_tables: Sequence[torch.Tensor],
    # per KV cache group: tokens per block
    block_sizes: Sequence[int],
    # per KV cache group: [rows] int64, out
    slots: Sequence[torch.Tensor],
    max_model_len: int,
) -> None:
    """Move every row to its next position and say where that position's KV goes.

    A live row advances by one; `seq_lens` then counts its context with the new position in it. A row that would
    pass `max_model_len` stops being live. A row that is not live stays where it is, within bounds, and its slot is
    `PAD_SLOT`: it may still be computed with the batch, but writes nothing, and attends to one position only.

    All updates are in place, on the tensors' device, without waiting for it.
    """
    positions.add_(live)
    live.logical_and_(positions < max_model_len)
    positions.clamp_(min=0, max=max_model_len - 1)
    seq_lens.copy_(positions + 1).masked_fill_(~live, 1)
    for block_table, block_size, slot in zip(block_tables, block_sizes, slots, strict=True):
        block_index = torch.div(positions, block_size, rounding_mode="floor")
        block = block_table.gather(1, block_index.unsqueeze(1)).squeeze(1)
        torch.add(positions.remainder(block_size), block, alpha=block_size, out=slot)
        slot.masked_fill_(~live, PAD_SLOT)
