"""Small random checkpoints of the architectures the tests serve, made when first asked for.

Random layers agree on nothing, so drafts from them would never be accepted. Here the later layers' residual
branches are shrunk: an early exit then agrees with the whole model often, and not always, which exercises
acceptance, partial acceptance and rejection alike.
"""

from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 160
EOS = 1

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": 2,
}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

# Two KV cache groups, and early layers in both of them.
_MIXED_ATTENTION = {
    "tie_word_embeddings": True,
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "num_hidden_layers": 5},
    "mistral-sliding": {"model_type": "mistral", "sliding_window": 24},
    "gemma": {"model_type": "gemma", "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", "query_pre_attn_scalar": 32, **_MIXED_ATTENTION},
    "gemma3": {"model_type": "gemma3_text", "query_pre_attn_scalar": 32, **_MIXED_ATTENTION},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3-moe": {"model_type": "qwen3_moe", "num_experts": 4, "norm_topk_prob": True, **_MOE},
    "phi3": {"model_type": "phi3"},
    "granite": {"model_type": "granite", "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 2, "n_positions": 512},
}


def checkpoint(folder: Path, architecture: str, seed: int = 0, **shape: Any) -> str:
    """The path of a checkpoint under `folder`, written on first use. `shape` overrides the configuration."""
    path = folder / f"{architecture}-{seed}-{crc32(repr(sorted(shape.items())).encode()):08x}"
    if not path.exists():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(**{**_SHAPE, **ARCHITECTURES[architecture], **shape})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _spread(model)
        model.save_pretrained(path)
        _tokenizer(config.vocab_size).save_pretrained(path)
    return str(path)


def _spread(model: torch.nn.Module) -> None:
    """Widen the logits so that greedy choices are clear, and shrink the residual branches with depth."""
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            if weight.dim() == 1 and "bias" not in name:
                weight.data += torch.randn_like(weight) * 0.1
            continue
        weight.data = torch.randn_like(weight) / weight.shape[-1] ** 0.5
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        is_branch_end = any(part in name for part in ("o_proj", "down_proj", "w2", "c_proj"))
        if layer is not None and is_branch_end:
            weight.data *= 2.0 if layer == 0 else 0.5 / layer
        if "embed" in name or "lm_head" in name:
            # Gemma scales its embedding up by the root of its width.
            weight.data *= 0.5 if "gemma" in model.config.model_type else 2.0


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One word a token, `w17 ` for token 17: enough to decode, and to stop at strings."""
    words = {"<s>": 0, "</s>": EOS, "<pad>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
