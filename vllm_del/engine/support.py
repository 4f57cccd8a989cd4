"""What `del` cannot serve, refused at start-up in one error that says what to change."""

from collections.abc import Iterator

from vllm.config import VllmConfig

from vllm_del.config import DelConfig


def check_supported(vllm_config: VllmConfig) -> None:
    """Raise `ValueError` naming every setting of `vllm_config` that `del` cannot work with."""
    problems = list(_problems(vllm_config))
    if problems:
        raise ValueError(
            "The speculative method 'del' cannot serve this configuration:\n"
            + "\n".join(f"- {problem}" for problem in problems)
            + "\nChange it as said, or start without --speculative-config del."
        )


def _problems(vllm_config: VllmConfig) -> Iterator[str]:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    name = f"model {model.model!r} ({', '.join(model.architectures)})"

    if model.runner_type != "generate":
        yield f"runner={model.runner_type!r}: a pooling model generates no tokens to draft; serve it without 'del'"
    if model.is_encoder_decoder:
        yield f"{name} is an encoder-decoder: serve a decoder-only model"
    if model.is_multimodal_model:
        yield f"{name} takes multimodal inputs: serve its text-only model"
    if model.use_mla:
        yield f"{name} uses multi-head latent attention (MLA): serve a model with ordinary attention"
    if model.is_hybrid or model.is_attention_free:
        yield f"{name} has recurrent (Mamba, linear-attention) layers: serve a pure transformer"
    if getattr(model, "is_diffusion", False):
        yield f"{name} is a diffusion model: serve an autoregressive one"

    if model.enable_prompt_embeds:
        yield "enable_prompt_embeds=True: 'del' serves prompts of tokens; leave it out"

    for field, value in (
        ("pipeline_parallel_size", parallel.pipeline_parallel_size),
        ("decode_context_parallel_size", parallel.decode_context_parallel_size),
        ("prefill_context_parallel_size", parallel.prefill_context_parallel_size),
    ):
        if value > 1:
            yield f"{field}={value}: set it to 1 (tensor parallelism works)"
    config = vllm_config.speculative_config
    if isinstance(config, DelConfig) and config.del_draft_vocab is not None and parallel.tensor_parallel_size > 1:
        size = parallel.tensor_parallel_size
        yield f"del_draft_vocab={config.del_draft_vocab!r} with tensor_parallel_size={size}: leave one of them out"
    if isinstance(config, DelConfig) and model.enable_sleep_mode:
        # What lies beside the weights is gone after a deep sleep.
        for field, value in (("del_draft_vocab", config.del_draft_vocab), ("del_draft_head", config.del_draft_head)):
            if value not in (None, "auto", "model"):
                yield f"{field}={value!r} with enable_sleep_mode=True: leave one of them out"
    if isinstance(config, DelConfig) and config.del_draft_head == "fp8" and vllm_config.weight_transfer_config:
        # The copy would stay what the weights were.
        yield "del_draft_head='fp8' with weight_transfer_config: leave one of them out"
    by_costs = isinstance(config, DelConfig) and config.is_dynamic and config.del_objective == "goodput"
    if parallel.data_parallel_size > 1 and model.is_moe and by_costs:
        # Every forward of such a model is one of all replicas: none may measure more, or draft deeper, than the others.
        yield (
            f"data_parallel_size={parallel.data_parallel_size} with {name}, a mixture of experts: its replicas cannot "
            "measure costs apart; set del_policy='fixed'"
        )
    if parallel.enable_eplb:
        yield "enable_eplb=True: set it to False"
    if parallel.use_ubatching:
        settings = f"enable_dbo={parallel.enable_dbo}, ubatch_size={parallel.ubatch_size}"
        yield f"dual batch overlap is on ({settings}): turn it off"
    if vllm_config.lora_config is not None:
        yield "enable_lora=True: merge the adapter into the model, or serve it without 'del'"
    if vllm_config.kv_transfer_config is not None:
        connector = vllm_config.kv_transfer_config.kv_connector
        yield f"kv_transfer_config with kv_connector={connector!r}: 'del' does not draft across one; leave it out"
    offload = vllm_config.offload_config
    if offload.offload_backend == "prefetch" or offload.prefetch.offload_group_size > 0:
        # The next layers' weights come in turn: a draft that leaves early would have others in their place.
        group = offload.prefetch.offload_group_size
        yield f"offload_group_size={group}: layers are fetched in turn, and a draft skips some; use cpu_offload_gb"
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        yield "kv_sharing_fast_prefill=True: set it to False"
    if vllm_config.device_config.device_type != "cpu" and not vllm_config.use_v2_model_runner:
        yield (
            f"model runner V1 on {vllm_config.device_config.device_type!r}: 'del' needs Model Runner V2 there; "
            "unset VLLM_USE_V2_MODEL_RUNNER=0, and what vLLM's log names as unsupported by V2"
        )
