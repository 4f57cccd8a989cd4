"""The early layers through vLLM's own compiler, the one the target's decoder goes through.

Where vLLM compiles, it builds the layers for that: their operations are plain torch, to be fused later. Run as they
are, they are slower than layers built for eager mode, and a draft step would cost more than its share of layers.

The layers are cut into segments, one between each two candidate exits, so that every layer is compiled once.
"""

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig

from vllm_del.draft.network import EarlyExitNetwork, Layers


def compiled_segments(
    vllm_config: VllmConfig, network: EarlyExitNetwork, exits: Sequence[int]
) -> list[Callable[..., Layers]]:
    """The segments that end at `exits` (depths, ascending).

    The first is called as `segment(input_ids, positions)`, the others as `segment(positions, hidden_states,
    residual)`. Each is compiled at its first call, which vLLM makes while it warms up; with `enforce_eager` not at all.
    """
    segments: list[Callable[..., Layers]] = []
    for start, end in zip((0, *exits), exits, strict=False):
        segment = _segment(start, end)
        # Compiled code is kept apart from the target's in vLLM's cache.
        with set_model_tag(f"del_layers_{start}_{end}"):
            segments.append(segment(vllm_config=vllm_config, network=network))
    return segments


def _segment(start: int, end: int) -> type[nn.Module]:
    """The class of the segment [start, end).

    A class and a function of its own: vLLM names compiled code by class and function, not by what an object holds.
    """

    class Segment(nn.Module):
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", network: EarlyExitNetwork) -> None:
            super().__init__()
            self.network = network
            self.start, self.end = start, end

        forward = _renamed(_further if start else _first, f"layers_{start}_{end}")

    rows = ("positions", "hidden_states", "residual") if start else ("input_ids", "positions")
    return support_torch_compile(Segment, dynamic_arg_dims=dict.fromkeys(rows, 0))


def _first(self: Any, input_ids: torch.Tensor, positions: torch.Tensor) -> Layers:
    return self.network.first(input_ids, positions, self.end)


def _further(self: Any, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None) -> Layers:
    return self.network.further(positions, hidden_states, residual, self.start, self.end)


def _renamed(function: Any, name: str) -> FunctionType:
    """A copy of `function` with a name and a code object of its own."""
    copy = FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    copy.__qualname__ = f"{__name__}.{name}"
    copy.__annotations__ = function.__annotations__
    return copy
