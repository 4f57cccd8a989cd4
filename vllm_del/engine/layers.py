"""What both runners need to know of the target: its early attention layers, and the line said at start."""

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from vllm_del.config import DelConfig
from vllm_del.draft.head import Head
from vllm_del.draft.network import EarlyExitNetwork

# Under vLLM's own logger, the only one it gives a handler.
logger = init_logger(f"vllm.{__name__}")


def early_attention_layers(network: EarlyExitNetwork, depth: int) -> set[str]:
    """vLLM's names of the attention layers below `depth`.

    Raises `ValueError` if one of them has no KV cache of its own: a draft could not write its positions.
    """
    names = set()
    for module in (module for layer in network.layers[:depth] for module in layer.modules()):
        if isinstance(module, AttentionLayerBase):
            name = module.layer_name
            shared_with = getattr(module, "kv_sharing_target_layer_name", None)
            if shared_with is not None:
                raise ValueError(
                    f"layer {name!r} shares the KV cache of {shared_with!r}, so drafts cannot write its positions: "
                    "set del_exit_layers to exits before it, or serve the model without the speculative method 'del'"
                )
            names.add(name)
    if not names:
        raise ValueError(
            f"the first {depth} layers of {type(network.target).__name__} hold no attention layer: serve it without "
            "the speculative method 'del'"
        )
    return names


def log_plan(vllm_config: VllmConfig, network: EarlyExitNetwork, head: Head, runner: str) -> None:
    """Say once, at start, what will happen."""
    config = vllm_config.speculative_config
    assert isinstance(config, DelConfig)
    depths = " or ".join(map(str, config.exits))
    logger.info_once(
        "del: %s drafts for itself, up to %d tokens a round with the first %s of its %d layers (%s, model runner %s, "
        "%s)",
        type(network.target).__name__,
        config.num_speculative_tokens,
        depths,
        network.num_layers,
        f"chosen for each sequence by {config.del_objective}" if config.is_dynamic else "fixed",
        runner,
        head,
    )
