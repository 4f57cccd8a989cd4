"""The LM head as a draft head: fused where its weight is plain and Triton runs, else through the target's logits."""

from typing import Any

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from vllm_del.draft.head import FusedHead, Head, LogitsHead
from vllm_del.kernels.backend import runs_triton

TRIED_ROWS = 1, 17, 33
"""Rows of a batch for each way that the kernel is compiled: not to be compiled while serving."""


def make_head(target: nn.Module) -> Head:
    """The head that stores no logits where it says what the target's own says, else that one."""
    fused = _fused(target)
    if fused is not None and all(_agrees(fused, target, rows) for rows in TRIED_ROWS):
        return fused
    return LogitsHead(target.compute_logits)


def _fused(target: nn.Module) -> FusedHead | None:
    """Of a head that is a plain matrix, or a shard of one; None for any other, and where Triton does not run."""
    # Gemma has no head beside its embedding.
    lm_head: Any = getattr(target, "lm_head", None) or getattr(target.model, "embed_tokens", None)
    processor: Any = getattr(target, "logits_processor", None)
    if not isinstance(lm_head, VocabParallelEmbedding) or processor is None:
        return None
    weight, shard = getattr(lm_head, "weight", None), lm_head.shard_indices
    if weight is None or not runs_triton(weight):
        return None
    # By what is the same on every rank: they have to choose alike, as they ask each other.
    plain = (
        isinstance(lm_head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod)
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
    return FusedHead(
        # Without the rows that pad it
        weight[: shard.num_org_elements],
        shard.org_vocab_start_index,
        processor.soft_cap,
        processor.scale,
        tensor_model_parallel_all_gather if lm_head.tp_size > 1 else None,
    )


@torch.inference_mode()
def _agrees(fused: FusedHead, target: nn.Module, rows: int) -> bool:
    """Whether both say the same of a few states: a model's own `compute_logits` may do what the fused head does not."""
    generator = torch.Generator(fused.weight.device).manual_seed(rows)
    shape = rows, fused.weight.shape[1]
    states = torch.randn(shape, device=fused.weight.device, generator=generator).to(fused.weight.dtype)
    token, probability = fused(states)
    logs = target.compute_logits(states).float().log_softmax(-1)
    # Rounding may choose another of two tokens that are nearly as probable: it has to be as probable in the target.
    near = 1e-4 if states.dtype == torch.float32 else 0.05
    of_token = logs.gather(1, token.unsqueeze(1)).squeeze(1)
    return bool(((of_token - probability.log()).abs() < near).all() and (logs.amax(1) - of_token < near).all())
