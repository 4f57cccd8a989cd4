"""What drafts go through of the LM head: all of it, the rows of a draft vocabulary, or a copy in FP8."""

from dataclasses import replace
from functools import partial

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.platforms import current_platform

from vllm_del.config import DelConfig, read_tokens
from vllm_del.draft.head import FusedHead, Head, LogitsHead, PlainHead, RenamedHead, quantise
from vllm_del.draft.vocabulary import DraftVocabulary
from vllm_del.engine.head import agrees, make_whole_head, plain_head, try_out
from vllm_del.kernels.backend import runs_triton

FP8_CAPABILITY = 89
"""8.9 is the first compute capability with numbers of this type."""

SMALL_COPY = 0.01
"""Of the target's memory, the most that a copy takes which nobody asked for."""


def make_heads(
    vllm_config: VllmConfig, target: nn.Module, device: torch.device
) -> tuple[Head, Head, DraftVocabulary | None]:
    """All of the target's head, what drafts go through of it, and the draft vocabulary if it is counted while serving.

    Raises `ValueError` if the target's head, or the machine, is not one for what the configuration wants.
    """
    whole, vocabulary = make_whole_head(target), _vocabulary(vllm_config, device)
    head = _draft_head(vllm_config, target, whole, vocabulary)
    return whole, head, vocabulary if vocabulary is not None and vocabulary.is_counted else None


def _vocabulary(vllm_config: VllmConfig, device: torch.device) -> DraftVocabulary | None:
    """The tokens that drafts are made of, if these are not all."""
    config, num_tokens = vllm_config.speculative_config, vllm_config.model_config.get_vocab_size()
    assert isinstance(config, DelConfig)
    listed = config.del_draft_vocab
    if listed is None:
        return None
    return DraftVocabulary(read_tokens(listed, num_tokens) if isinstance(listed, str) else listed, num_tokens, device)


def _draft_head(
    vllm_config: VllmConfig, target: nn.Module, whole: FusedHead | LogitsHead, vocabulary: DraftVocabulary | None
) -> Head:
    """`whole`, or of it what the configuration wants."""
    config, plain = vllm_config.speculative_config, plain_head(target)
    assert isinstance(config, DelConfig)
    fused = isinstance(whole, FusedHead)
    ready = fused and plain is not None and _has_fp8(plain)
    fp8 = config.del_draft_head == "fp8"
    stays = not vllm_config.model_config.enable_sleep_mode and vllm_config.weight_transfer_config is None
    if config.del_draft_head == "auto" and ready and stays:
        # By what is the same on every rank.
        ranks = vllm_config.parallel_config.tensor_parallel_size
        rows = -(-vllm_config.model_config.get_vocab_size() // ranks) if vocabulary is None else len(vocabulary.tokens)
        target_bytes = sum(weight.numel() * weight.element_size() for weight in target.parameters())
        fp8 = current_platform.is_cuda() and is_small(rows * vllm_config.model_config.get_hidden_size(), target_bytes)
    if not fp8 and vocabulary is None:
        return whole
    wanted = f"del_draft_head={config.del_draft_head!r}" if fp8 else f"del_draft_vocab={config.del_draft_vocab!r}"
    # A kernel that does not say what the target says has found that out already.
    if plain is None or not (fused or (not runs_triton(plain.weight) and _is_all(plain, target))):
        raise ValueError(f"{wanted}: the LM head of {type(target).__name__} is not a plain matrix; leave it out")
    if fp8 and not ready:
        needed = f"a GPU of compute capability {FP8_CAPABILITY / 10} or more"
        raise ValueError(f"{wanted}: an LM head in FP8 needs {needed}; leave it out")
    if fp8:
        head = _in_fp8(plain, vocabulary)
    else:
        assert vocabulary is not None
        head = FusedHead(plain, shortlist=vocabulary.tokens) if fused else _copied(plain, vocabulary)
    try_out(head, plain.weight)
    return head


def is_small(copy_bytes: int, target_bytes: int) -> bool:
    """Whether a copy is worth its memory unasked."""
    return copy_bytes <= SMALL_COPY * target_bytes


def _is_all(plain: PlainHead, target: nn.Module) -> bool:
    """Whether the target's logits are those of its matrix."""
    head = LogitsHead(lambda states: plain.finish(nn.functional.linear(states, plain.weight)))
    return agrees(head, target, plain.weight)


def _in_fp8(plain: PlainHead, vocabulary: DraftVocabulary | None) -> Head:
    """A copy of half the size, and of the rows of a vocabulary if there is one."""
    tokens = None if vocabulary is None else vocabulary.tokens
    number, hidden_size = len(plain.weight if tokens is None else tokens), plain.weight.shape[1]
    rows = torch.empty(number, hidden_size, dtype=torch.float8_e4m3fn, device=plain.weight.device)
    scales = torch.empty(number, device=plain.weight.device)
    head = FusedHead(replace(plain, weight=rows), row_scales=scales)
    renew = partial(quantise, plain.weight, tokens, rows, scales)
    if vocabulary is None:
        renew()
        return head
    vocabulary.follow(renew)
    return RenamedHead(head, vocabulary.tokens)


def _copied(plain: PlainHead, vocabulary: DraftVocabulary) -> Head:
    """On a CPU, where rows have to lie together, and as vLLM packs them."""
    copy = nn.Module()

    def renew() -> None:
        copy.weight = nn.Parameter(plain.weight[vocabulary.tokens], requires_grad=False)
        dispatch_cpu_unquantized_gemm(copy, remove_weight=True)

    vocabulary.follow(renew)
    head = LogitsHead(lambda states: plain.finish(copy.cpu_linear(states, copy.weight, None)))
    return RenamedHead(head, vocabulary.tokens)


def _has_fp8(plain: PlainHead) -> bool:
    """Whether the kernel reads FP8 there; its interpreter does."""
    is_new = current_platform.is_cuda() and current_platform.has_device_capability(FP8_CAPABILITY)
    return is_new if plain.weight.is_cuda else runs_triton(plain.weight)
