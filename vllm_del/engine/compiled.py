"""The early-exit network through vLLM's own compiler, the one the target's decoder goes through.

Where vLLM compiles, it builds the layers for that: their operations are plain torch, to be fused later. Run as they
are, they are slower than layers built for eager mode, and a draft step would cost more than its share of layers.
"""

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig

from vllm_del.draft.network import EarlyExitNetwork


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0})
class CompiledExit(nn.Module):
    """The network up to one exit. Compiled at its first call, which vLLM makes while it warms up; with
    `enforce_eager` not at all.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", network: EarlyExitNetwork, depth: int) -> None:
        super().__init__()
        self.network = network
        self.depth = depth

    def forward(
        self,
        # [rows] int
        input_ids: torch.Tensor,
        # [rows] int64
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """The hidden states [rows, hidden size] that the LM head reads."""
        return self.network(input_ids, positions, self.depth)


def compiled_exit(vllm_config: VllmConfig, network: EarlyExitNetwork, depth: int) -> CompiledExit:
    """`network` up to `depth`, its compiled code kept apart from the target's in vLLM's cache."""
    with set_model_tag(f"del_exit_{depth}"):
        return CompiledExit(vllm_config=vllm_config, network=network, depth=depth)
