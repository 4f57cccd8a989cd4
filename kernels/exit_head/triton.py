"""`exit_head` in Triton: one pass over the LM head, and no logits in memory.

At 128k x 4096 in bfloat16 the head is 1 GB, read in every draft step, while the states of 16 rows are 128 KB: so the
vocabulary is split among the programs, each reads its part of the weight once for all rows, and keeps for each row
only the best token so far and the running sum of exponentials (the online softmax of Milakov and Gimelshein,
arXiv 1805.02867). A second, small launch merges the parts. Norm, soft-cap, scales, shortlist and noise are applied on
the way. What is not asked for, as it is None, is not compiled in.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from .reference import SMALL, SMALLEST, HeadTokens

ROWS, MOST_ROWS = 16, 128
"""Rows that a program computes together: the least that tensor cores take, and the most. A larger batch reads the
weight again for each `MOST_ROWS`."""

SHAPES = [
    triton.Config({"BLOCK_TOKENS": tokens, "BLOCK_BYTES": size}, num_warps=warps, num_stages=stages)
    for tokens, size, warps, stages in (
        (64, 256, 4, 3),
        (64, 256, 8, 4),
        (32, 256, 4, 4),
        (128, 128, 8, 4),
        (128, 256, 8, 3),
    )
]
"""What a program may read of the weight at once: of so many tokens so much. On a GPU the first call with a head
measures which is best, for each number of rows computed together, and Triton keeps that on disk."""

PROGRAMS_PER_PROCESSOR = 4
"""So many parts of the vocabulary for each multiprocessor: while one waits for memory others compute."""

LEAST_TOKENS = 64
"""A smaller part of the vocabulary is not worth a program."""

MERGED = 1024
"""A program of the second launch merges the parts of as many rows as make so many values."""

_NO_TOKEN = tl.constexpr(2**62)
_SMALL = tl.constexpr(SMALL)
_SMALLEST = tl.constexpr(SMALLEST)


def exit_head(states: torch.Tensor, weight: torch.Tensor, **options: Any) -> HeadTokens:
    """See the reference. Accumulates in float32; with a norm, rounds its result to the type of `states`."""
    merged = _empty(len(states), device=states.device)
    if len(states):
        parts = sweep(states, weight, **options)
        grid, shape = merging(parts)
        _merge_parts[grid](*parts, *merged, *parts.token.shape, **shape)
    return merged


def sweep(
    states: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None = None,
    epsilon: float = 1e-6,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    row_scales: torch.Tensor | None = None,
    shortlist: torch.Tensor | None = None,
    first_token: int = 0,
    temperature: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
) -> HeadTokens:
    """What each part of the vocabulary says of one row or more, [parts, rows] each; with the options of `exit_head`."""
    num_rows, hidden_size = states.shape
    vocabulary = len(weight) if shortlist is None else len(shortlist)
    rows = rows_together(num_rows)
    # The same for any number of rows: each other number of parts would be compiled apart.
    parts = min(PROGRAMS_PER_PROCESSOR * _processors(states.device), triton.cdiv(vocabulary, LEAST_TOKENS))
    of_parts = _empty(parts, num_rows, device=states.device)
    on_gpu = states.is_cuda
    # Tiles of rows that read the same part run side by side, and find it in the cache.
    (_read_part_tuned if on_gpu else _read_part)[(triton.cdiv(num_rows, rows), parts)](
        states,
        weight,
        norm_weight,
        row_scales,
        shortlist,
        temperature,
        seeds,
        *of_parts,
        num_rows,
        hidden_size,
        vocabulary,
        states.stride(0),
        weight.stride(0),
        first_token,
        parts,
        epsilon,
        soft_cap,
        logit_scale,
        ROWS=rows,
        # Of float32 there is less at once: its products need registers.
        ELEMENT_BYTES=8 if states.dtype == torch.float32 else 2,
        **({} if on_gpu else SHAPES[0].all_kwargs()),
    )
    return of_parts


def rows_together(num_rows: int) -> int:
    """How many rows a program computes together: each number is compiled, and tuned, apart."""
    return min(MOST_ROWS, max(ROWS, triton.next_power_of_2(num_rows)))


def merging(parts: HeadTokens) -> tuple[tuple[int], dict[str, int]]:
    """Grid and block shape of a launch that merges what `sweep` gives."""
    number, num_rows = parts.token.shape
    block = triton.next_power_of_2(number)
    rows = max(1, MERGED // block)
    return (triton.cdiv(num_rows, rows),), {"PARTS": block, "ROWS": rows}


def _empty(*shape: int, device: torch.device) -> HeadTokens:
    # Each of its own: Triton compiles apart for what does not begin at 16 bytes, as parts of one tensor would.
    token = torch.empty(shape, dtype=torch.int64, device=device)
    return HeadTokens(token, *(torch.empty(shape, dtype=torch.float32, device=device) for _ in range(3)))


@cache
def _processors(device: torch.device) -> int:
    """The multiprocessors of a GPU; in the interpreter one, which still makes parts to merge."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# Batches of other sizes must not be compiled for while serving.
@triton.jit(do_not_specialize=["num_rows", "parts", "first_token"])
def _read_part(
    states,
    weight,
    norm_weight,
    row_scales,
    shortlist,
    temperature,
    seeds,
    # [parts, rows] each
    token_out,
    score_out,
    logit_out,
    log_sum_out,
    num_rows,
    hidden_size,
    vocabulary,
    states_stride,
    weight_stride,
    first_token,
    parts,
    epsilon,
    soft_cap,
    logit_scale,
    ROWS: tl.constexpr,
    ELEMENT_BYTES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """The best token and the sum of exponentials of `ROWS` rows over one part of the vocabulary; there may be none in
    the last ones."""
    BLOCK_HIDDEN: tl.constexpr = BLOCK_BYTES // ELEMENT_BYTES
    part = tl.program_id(1)
    blocks_a_part = tl.cdiv(tl.cdiv(vocabulary, parts), BLOCK_TOKENS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    states_row = states + row.to(tl.int64) * states_stride
    block_hidden = tl.arange(0, BLOCK_HIDDEN)

    shrink = tl.full((ROWS,), 1.0, tl.float32)
    if norm_weight is not None:
        squares = tl.zeros((ROWS,), tl.float32)
        for begin in range(0, hidden_size, BLOCK_HIDDEN):
            at = begin + block_hidden
            inside = is_row[:, None] & (at < hidden_size)[None, :]
            values = tl.load(states_row[:, None] + at[None, :], mask=inside, other=0.0).to(tl.float32)
            squares += tl.sum(values * values, 1)
        shrink = tl.rsqrt(squares / hidden_size + epsilon)

    best_token = tl.full((ROWS,), _NO_TOKEN, tl.int64)
    best_score = tl.full((ROWS,), float("-inf"), tl.float32)
    best_logit = tl.full((ROWS,), float("-inf"), tl.float32)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for block in range(blocks_a_part):
        place = (part * blocks_a_part + block) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        is_token = place < vocabulary
        # In 64 bits: a head may have more than 2^31 elements.
        weight_row = place.to(tl.int64)
        if shortlist is not None:
            weight_row = tl.load(shortlist + place, mask=is_token, other=0)
        weight_at = weight + weight_row * weight_stride
        logits = tl.zeros((ROWS, BLOCK_TOKENS), tl.float32)
        for begin in range(0, hidden_size, BLOCK_HIDDEN):
            at = begin + block_hidden
            in_hidden = at < hidden_size
            values = tl.load(states_row[:, None] + at[None, :], mask=is_row[:, None] & in_hidden[None, :], other=0.0)
            if norm_weight is not None:
                scale = tl.load(norm_weight + at, mask=in_hidden, other=0.0).to(tl.float32)
                values = (values.to(tl.float32) * shrink[:, None] * scale[None, :]).to(states.dtype.element_ty)
            head = tl.load(weight_at[None, :] + at[:, None], mask=is_token[None, :] & in_hidden[:, None], other=0.0)
            # TensorFloat-32 would round the logits of a float32 model to 10 bits.
            logits = tl.dot(values, head.to(values.dtype), acc=logits, input_precision="ieee")
        if row_scales is not None:
            logits *= tl.load(row_scales + weight_row, mask=is_token, other=0)[None, :]
        if soft_cap is not None:
            # tanh by an exponential that cannot overflow
            shrunk = tl.exp(-2 * tl.abs(logits) / soft_cap)
            capped = soft_cap * (1 - shrunk) / (1 + shrunk)
            logits = tl.where(logits < 0, -capped, tl.where(logits == logits, capped, logits))
        logits *= logit_scale
        token = weight_row + first_token
        scores = logits
        if seeds is not None:
            heat = tl.load(temperature + row, mask=is_row, other=0)
            logits = logits / tl.where(heat == 0, 1.0, heat)[:, None]
            seed = tl.load(seeds + row, mask=is_row, other=0)
            u = tl.maximum(tl.rand(seed[:, None], token[None, :]), _SMALLEST)
            waited = tl.where(u < _SMALL, u * (1 + u * (0.5 + u / 3)), -tl.log(1 - u))
            scores = tl.where(heat[:, None] == 0, logits, logits - tl.log(waited))
        logits = tl.where(is_token[None, :], logits, float("-inf"))
        scores = tl.where(is_token[None, :], scores, float("-inf"))

        # The first of equals; NaN is larger than anything.
        is_nan = scores != scores
        any_nan = tl.max(is_nan.to(tl.int32), 1) > 0
        score = tl.max(tl.where(is_nan, float("-inf"), scores), 1)
        is_best = tl.where(any_nan[:, None], is_nan, scores == score[:, None])
        first = tl.min(tl.where(is_best & is_token[None, :], token[None, :], _NO_TOKEN), 1)
        # Not by a product with a mask: there may be infinities.
        logit = tl.max(tl.where(token[None, :] == first[:, None], logits, float("-inf")), 1)
        score = tl.where(any_nan, float("nan"), score)
        logit = tl.where(any_nan, float("nan"), logit)
        has_nan = best_score != best_score
        better = ~has_nan & (any_nan | (score > best_score) | (best_token == _NO_TOKEN))
        best_token = tl.where(better, first, best_token)
        best_score = tl.where(better, score, best_score)
        best_logit = tl.where(better, logit, best_logit)

        now_largest = tl.maximum(largest, tl.max(tl.where(logits != logits, float("-inf"), logits), 1))
        base = _finite(now_largest)
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
        largest = now_largest

    out = part.to(tl.int64) * num_rows + row
    base = _finite(largest)
    tl.store(token_out + out, best_token, mask=is_row)
    tl.store(score_out + out, best_score, mask=is_row)
    tl.store(logit_out + out, best_logit, mask=is_row)
    tl.store(log_sum_out + out, base + tl.log(total), mask=is_row)


_read_part_tuned = triton.autotune(SHAPES, key=["hidden_size", "vocabulary", "ROWS"], cache_results=True)(_read_part)


@triton.jit
def _finite(largest):
    """What to subtract before the exponential: nothing of an infinity, which would leave NaN."""
    return tl.where(tl.abs(largest) == float("inf"), 0.0, largest)


@triton.jit(do_not_specialize=["num_parts", "num_rows"])
def _merge_parts(
    # [parts, rows] each
    token_in,
    score_in,
    logit_in,
    log_sum_in,
    # [rows] each
    token_out,
    score_out,
    logit_out,
    log_sum_out,
    num_parts,
    num_rows,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What all parts together say of some rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, score, logit, log_sum = merged_rows(
        token_in, score_in, logit_in, log_sum_in, row, num_parts, num_rows, PARTS
    )
    is_row = row < num_rows
    tl.store(token_out + row, token, mask=is_row)
    tl.store(score_out + row, score, mask=is_row)
    tl.store(logit_out + row, logit, mask=is_row)
    tl.store(log_sum_out + row, log_sum, mask=is_row)


@triton.jit
def merged_rows(token_in, score_in, logit_in, log_sum_in, row, num_parts, num_rows, PARTS: tl.constexpr):
    """The best of the parts of each row, and the sum of their exponentials."""
    part = tl.arange(0, PARTS)[:, None]
    is_part = (part < num_parts) & (row < num_rows)[None, :]
    at = part.to(tl.int64) * num_rows + row[None, :]
    token = tl.load(token_in + at, mask=is_part, other=_NO_TOKEN)
    scores = tl.load(score_in + at, mask=is_part, other=float("-inf"))
    logits = tl.load(logit_in + at, mask=is_part, other=float("-inf"))
    log_sums = tl.load(log_sum_in + at, mask=is_part, other=float("-inf"))

    is_nan = scores != scores
    any_nan = tl.max(is_nan.to(tl.int32), 0) > 0
    score = tl.max(tl.where(is_nan, float("-inf"), scores), 0)
    is_best = tl.where(any_nan[None, :], is_nan, scores == score[None, :])
    first = tl.min(tl.where(is_best & is_part, token, _NO_TOKEN), 0)
    logit = tl.max(tl.where(token == first[None, :], logits, float("-inf")), 0)
    largest = tl.max(tl.where(log_sums != log_sums, float("-inf"), log_sums), 0)
    base = _finite(largest)
    log_sum = base + tl.log(tl.sum(tl.exp(log_sums - base[None, :]), 0))
    return first, tl.where(any_nan, float("nan"), score), tl.where(any_nan, float("nan"), logit), log_sum
