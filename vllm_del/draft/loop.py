"""One drafting round, step by step; the same for both of vLLM's runners.

A step feeds one token a sequence: first the token sampled last, then each token drafted from it. The early layers
read the KV that the target's own forward wrote for the context, and write theirs for the drafted positions, into
the sequence's own look-ahead slots. Verification writes those positions again, with equal values for every
accepted token; a rejected position is written again before anything reads it. So there is nothing to copy,
nothing to roll back and no draft prefill.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from vllm_del.draft.head import ExitHead
from vllm_del.kernels.advance_rows import advance_rows


@dataclass
class DraftRows:
    """The rows of a round: tensors on the model's device, one row a sequence, reused from round to round."""

    # [rows] int32: the token each row feeds next
    input_ids: torch.Tensor
    # [rows] int64: the position fed last; one before the first draft step's
    positions: torch.Tensor
    # [rows] int32: the context length of the step, its own position included
    seq_lens: torch.Tensor
    # [rows] bool: rows that draft; the others are computed along and write nothing
    live: torch.Tensor
    # per KV cache group: [rows, max_blocks] int32, the tokens in a block, and [rows] int64
    block_tables: Sequence[torch.Tensor]
    block_sizes: Sequence[int]
    slots: Sequence[torch.Tensor]


AttentionContext = Callable[[int], AbstractContextManager[None]]
"""`attention(step)` is vLLM's forward context for a draft step: one query token a row, as `DraftRows` says."""


Exit = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""`exit(input_ids, positions)` is the early-exit network up to the exit: the hidden states that the head reads."""


def draft(
    exit: Exit,
    head: ExitHead,
    rows: DraftRows,
    attention: AttentionContext,
    max_model_len: int,
    # [rows, draft length] int64, out
    draft_tokens: torch.Tensor,
) -> None:
    """Draft `draft_tokens.shape[1]` tokens for every row, each leaving at `exit`.

    Tokens of rows that are not live are meaningless, and so are those past `max_model_len`: vLLM schedules neither.
    """
    for step in range(draft_tokens.shape[1]):
        advance_rows(
            rows.positions,
            rows.seq_lens,
            rows.live,
            rows.block_tables,
            rows.block_sizes,
            rows.slots,
            max_model_len,
        )
        with attention(step):
            hidden_states = exit(rows.input_ids, rows.positions)
        token = head(hidden_states)
        draft_tokens[:, step] = token
        rows.input_ids.copy_(token)
