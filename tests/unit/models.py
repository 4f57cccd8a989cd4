"""`config.json` of models small enough to write down: all that vLLM needs to build a configuration, no weights."""

import json
from pathlib import Path

LLAMA_LAYERS, LLAMA_TOKENS = 12, 256

_DECODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": LLAMA_LAYERS,
    "vocab_size": LLAMA_TOKENS,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "dtype": "float32",
}
# Token ids that the model types default to lie outside a vocabulary this small.
_NO_SPECIAL_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}

MODELS: dict[str, dict] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **_DECODER},
    "one_layer": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **_DECODER, "num_hidden_layers": 1},
    "sliding_window": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        **_DECODER,
        "sliding_window": 64,
    },
    "mla": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        **_DECODER,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
    "recurrent": {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        **_DECODER,
        **_NO_SPECIAL_TOKENS,
        "state_size": 8,
        "conv_kernel": 4,
        "time_step_rank": 4,
    },
    "hybrid": {
        "architectures": ["JambaForCausalLM"],
        "model_type": "jamba",
        **_DECODER,
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 4,
    },
    "encoder_decoder": {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        **_NO_SPECIAL_TOKENS,
        "decoder_start_token_id": 0,
        "vocab_size": 256,
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "dtype": "float32",
    },
    # Audio and not vision, whose processors need torchvision to be looked at.
    "multimodal": {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "audio_config": {"model_type": "qwen2_audio_encoder", "d_model": 64, "encoder_layers": 2},
        "text_config": {"model_type": "qwen2", **_DECODER},
        "audio_token_index": 255,
        "dtype": "float32",
    },
    "encoder": {"architectures": ["BertModel"], "model_type": "bert", **_DECODER},
}


def write_models(folder: Path) -> dict[str, str]:
    """Every model's folder under `folder`, by its name in `MODELS`."""
    paths = {}
    for name, model_config in MODELS.items():
        path = folder / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(model_config))
        paths[name] = str(path)
    return paths
