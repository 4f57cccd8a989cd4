"""The LM head as a draft head: fused where its weight is plain and Triton runs, else through the target's logits."""

from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_del.draft.head import FusedHead, Head, LogitsHead
from vllm_del.kernels.backend import runs_triton


def make_head(target: nn.Module) -> Head:
    """The faster head that says what the target's `compute_logits` says."""
    plain = LogitsHead(target.compute_logits)
    fused = _fused(target)
    return fused if fused is not None and _agree(fused, plain) else plain


def _fused(target: nn.Module) -> FusedHead | None:
    """Of a head that is a plain matrix, or a shard of one; None for any other, and where Triton does not run."""
    # Gemma has no head beside its embedding.
    lm_head: Any = getattr(target, "lm_head", None) or getattr(target.model, "embed_tokens", None)
    processor: Any = getattr(target, "logits_processor", None)
    weight = getattr(lm_head, "weight", None)
    if weight is None or processor is None or not runs_triton(weight):
        return None
    shard = lm_head.shard_indices
    plain = (
        isinstance(lm_head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod)
        and getattr(lm_head, "bias", None) is None
        and not shard.num_added_elements
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
        tensor_model_parallel_all_gather if get_tensor_model_parallel_world_size() > 1 else None,
    )


@torch.inference_mode()
def _agree(fused: FusedHead, plain: LogitsHead) -> bool:
    """Whether both say the same of a few states: a model's own `compute_logits` may do what the fused head does not."""
    generator = torch.Generator(fused.weight.device).manual_seed(0)
    shape = 4, fused.weight.shape[1]
    states = torch.randn(shape, device=fused.weight.device, generator=generator).to(fused.weight.dtype)
    (token, probability), (expected, expected_probability) = fused(states), plain(states)
    # Rounding may choose another token, hardly less probable; a scale that was missed would change how probable it is.
    is_exact = states.dtype == torch.float32
    close = torch.isclose(probability, expected_probability, rtol=1e-4 if is_exact else 0.2, atol=1e-6)
    return bool((close & ((token == expected) | (not is_exact))).all())
