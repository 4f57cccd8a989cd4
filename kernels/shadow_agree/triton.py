"""`shadow_agree` in Triton: two launches, as `exit_head`, of which the second one compares.

A burst of shadow tokens has many rows: the sweep computes up to 128 of them at each read of the weight.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from vllm_del.kernels.exit_head.triton import merged_rows, merging, sweep


def shadow_agree(
    states: torch.Tensor, weight: torch.Tensor, expected: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference."""
    pairs = len(states)
    agrees = torch.empty(pairs, dtype=torch.bool, device=states.device)
    probability = torch.empty(pairs, dtype=torch.float32, device=states.device)
    if pairs:
        parts = sweep(states, weight, **options)
        grid, shape = merging(parts)
        _compare[grid](*parts, expected, agrees, probability, *parts.token.shape, **shape)
    return agrees, probability


@triton.jit(do_not_specialize=["num_parts", "num_rows"])
def _compare(
    # [parts, rows] each
    token_in,
    score_in,
    logit_in,
    log_sum_in,
    # [rows] each
    expected,
    agrees,
    probability,
    num_parts,
    num_rows,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    token, _, logit, log_sum = merged_rows(token_in, score_in, logit_in, log_sum_in, row, num_parts, num_rows, PARTS)
    tl.store(agrees + row, token == tl.load(expected + row, mask=is_row, other=0), mask=is_row)
    tl.store(probability + row, tl.exp(logit - log_sum), mask=is_row)
