"""The LM head as a draft head: fused where its weight is plain and Triton runs, else through the target's logits."""

import time
from typing import Any

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from vllm_del.draft.head import FusedHead, Head, LogitsHead, PlainHead
from vllm_del.kernels.backend import runs_triton

logger = init_logger(f"vllm.{__name__}")

TRIED_ROWS = 16, 32, 64, 128
"""Rows of a batch for each way that kernels are compiled: not to be compiled, or tuned, while serving. The most of
each: a shape of block that suits few rows may be slow for many, and hardly the other way round."""


def make_whole_head(target: nn.Module) -> FusedHead | LogitsHead:
    """The head that stores no logits where it says what the target's own says, else that one."""
    plain = plain_head(target)
    if plain is not None and runs_triton(plain.weight):
        fused = FusedHead(plain)
        if agrees(fused, target, plain.weight):
            try_out(fused, plain.weight)
            return fused
        logger.warning_once(
            "del: %s does not say what the logits of %s say: drafts take these, which is slower",
            fused,
            type(target).__name__,
        )
    return LogitsHead(target.compute_logits)


def plain_head(target: nn.Module) -> PlainHead | None:
    """Of a head that is a plain matrix, or a shard of one, by what is the same on every rank; None for any other."""
    # Gemma has no head beside its embedding.
    lm_head: Any = getattr(target, "lm_head", None) or getattr(target.model, "embed_tokens", None)
    processor: Any = getattr(target, "logits_processor", None)
    if not isinstance(lm_head, VocabParallelEmbedding) or processor is None:
        return None
    weight: Any = getattr(lm_head, "weight", None)
    shard = lm_head.shard_indices
    # Ranks have to choose alike, as they ask each other.
    plain = (
        weight is not None
        and isinstance(lm_head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod)
        and getattr(lm_head, "bias", None) is None
        and not lm_head.num_added_embeddings
        # Nobody's shard is all padding.
        and lm_head.num_embeddings_per_partition * (lm_head.tp_size - 1) < lm_head.org_vocab_size
        and processor.head_dtype in (None, weight.dtype)
        and weight.dim() == 2
        and weight.stride(1) == 1
    )
    if not plain:
        return None
    return PlainHead(
        # Without the rows that pad it
        weight[: shard.num_org_elements],
        shard.org_vocab_start_index,
        processor.soft_cap,
        processor.scale,
        tensor_model_parallel_all_gather if lm_head.tp_size > 1 else None,
    )


@torch.inference_mode()
def try_out(
    head: Head,
    # [vocabulary, hidden size]
    weight: torch.Tensor,
) -> None:
    """Have everything compiled that `head` may launch in service."""
    begin = time.perf_counter()
    for rows in TRIED_ROWS:
        states = torch.zeros(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
        token, _ = head(states)
        head.agree(states, token)
    logger.info_once("del: %s made ready in %.1f s", head, time.perf_counter() - begin)


@torch.inference_mode()
def agrees(head: Head, target: nn.Module, weight: torch.Tensor) -> bool:
    """Whether both say the same of a few states: a model's own `compute_logits` may do what `head` does not."""
    return all(_agrees(head, target, weight, rows) for rows in TRIED_ROWS)


def _agrees(head: Head, target: nn.Module, weight: torch.Tensor, rows: int) -> bool:
    generator = torch.Generator(weight.device).manual_seed(rows)
    states = torch.randn(rows, weight.shape[1], device=weight.device, generator=generator).to(weight.dtype)
    token, probability = head(states)
    logits = target.compute_logits(states).float()
    logs = logits.log_softmax(-1)
    # Rounding may choose another of two tokens that are nearly as probable: it has to be as probable in the target,
    # whose logits are rounded to the model's type.
    slack = 1e-4 if states.dtype == torch.float32 else 0.05
    near = slack + torch.finfo(states.dtype).eps * logits.amax(1).abs()
    of_token = logs.gather(1, token.unsqueeze(1)).squeeze(1)
    return bool(((of_token - probability.log()).abs() < near).all() and (logs.amax(1) - of_token < near).all())
