"""`advance_rows` in plain torch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

PAD_SLOT = -1
"""The slot that no KV is written to (vLLM's `PAD_SLOT_ID`)."""

NO_TOKEN = -1
"""Where a row drafted nothing (vLLM's `PLACEHOLDER_TOKEN_ID`)."""


class Said(NamedTuple):
    """What a draft step said of each row, what it stops by, and where it is written."""

    # [rows] int64, [rows] float32
    token: torch.Tensor
    confidence: torch.Tensor
    # steps of this round before it
    step: int
    # [rows] int64: drafts of a row; [rows] float32: a draft less probable is the row's last one, NaN for never
    length: torch.Tensor
    stop_below: torch.Tensor
    # [rows] int32, out: what the next step feeds
    input_ids: torch.Tensor
    # [rows] int64: which of the round's rows these are
    place: torch.Tensor
    # [rows of the round, longest draft] int64 and float32, out
    tokens: torch.Tensor
    confidences: torch.Tensor


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
    said: Said | None = None,
) -> None:
    """End a draft step, and move every row to the next one's position, sequence length and KV slot.

    What was `said` is written down, `NO_TOKEN` for rows that are not live; a row stops after its last draft, and after
    one that is not probable enough. Without it a round begins.

    A live row advances by one; `seq_lens` then counts its context with the new position in it. A row that would
    pass `max_model_len` stops being live. A row that is not live stays where it is, within bounds, and its slot is
    `PAD_SLOT`: it may still be computed with the batch, but writes nothing, and attends to one position only.

    All updates are in place, on the tensors' device, without waiting for it.
    """
    if said is not None:
        said.tokens.select(1, said.step).scatter_(0, said.place, said.token.where(live, NO_TOKEN))
        said.confidences.select(1, said.step).scatter_(0, said.place, said.confidence)
        said.input_ids.copy_(said.token)
        # Not `>=`, which a threshold of NaN would fail.
        live.logical_and_(~(said.confidence < said.stop_below)).logical_and_(said.length > said.step + 1)
    positions.add_(live)
    live.logical_and_(positions < max_model_len)
    positions.clamp_(min=0, max=max_model_len - 1)
    ended = ~live
    seq_lens.copy_(positions).add_(1).masked_fill_(ended, 1)
    for block_table, block_size, slot in zip(block_tables, block_sizes, slots, strict=True):
        block_index = torch.div(positions, block_size, rounding_mode="floor")
        block = block_table.gather(1, block_index.unsqueeze(1)).squeeze(1)
        torch.add(positions.remainder(block_size), block, alpha=block_size, out=slot)
        slot.masked_fill_(ended, PAD_SLOT)
