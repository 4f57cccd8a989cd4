"""EarlyExitNetwork: the target's own embedding and first layers, as a draft network. It owns no weights."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

Layers = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]
"""What some layers give, [rows, hidden size] each: hidden states and residual, both for the next layer, and what the
LM head reads when leaving here."""


class EarlyExitNetwork(nn.Module):
    """A view over the target: its token embedding, its layers and its final norm, to be run up to any depth.

    Made for decoders of the common shape: `embed_input_ids`, a list `layers` called as
    `layer(positions, hidden_states, residual)`, and `norm(hidden_states, residual)`; `from_target` raises
    `ValueError` for any other.
    """

    def __init__(self, target: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.target = target
        self.decoder = decoder
        self.layers = tuple(decoder.layers)  # slicing a ModuleList would build a new one at every draft step

    @classmethod
    def from_target(cls, target: nn.Module) -> "EarlyExitNetwork":
        """The network over `target`, after checking that it computes what the target's own forward does."""
        name = type(target).__name__
        decoder = getattr(target, "model", None)
        for owner, attribute in ((target, "compute_logits"), (decoder, "embed_input_ids"), (decoder, "norm")):
            if not hasattr(owner, attribute):
                raise _refusal(name, f"its decoder has no `{attribute}`")
        layers = getattr(decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList) or len(layers) < 2:
            raise _refusal(name, "its decoder has no list of at least 2 `layers`")
        assert decoder is not None
        network = cls(target, decoder)
        _check_same_computation(network, name)
        return network

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def first(
        self,
        # [rows] int
        input_ids: torch.Tensor,
        # [rows] int64
        positions: torch.Tensor,
        end: int,
    ) -> Layers:
        """Embedding and layers [0, end). Runs inside vLLM's forward context: attention finds its KV there."""
        return self.further(positions, self.decoder.embed_input_ids(input_ids), None, 0, end)

    def further(
        self,
        # [rows] int64
        positions: torch.Tensor,
        # [rows, hidden size] each: what layer `start` is called with
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        start: int,
        end: int,
    ) -> Layers:
        """Layers [start, end)."""
        for layer in self.layers[start:end]:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return hidden_states, residual, self.read_out(hidden_states if residual is None else hidden_states + residual)

    def read_out(
        self,
        # [..., hidden size]: hidden state and residual together, as vLLM hands out auxiliary hidden states
        state: torch.Tensor,
    ) -> torch.Tensor:
        """What the LM head reads where a draft leaves, [..., hidden size].

        Without the residual as an argument: the fused norm would write over both, and deeper layers still need them.
        """
        return self.decoder.norm(state)


def _check_same_computation(network: EarlyExitNetwork, name: str) -> None:
    """Run the target's own forward and the network's, with every layer replaced by the same stand-in.

    What then differs is what the network would get wrong: another order or subset of layers, another way to call
    them, a scale on the embedding, a step before the norm. Stand-ins make it cheap and free of attention state.
    """
    decoder = network.decoder
    weight = next(decoder.parameters())
    input_ids = torch.arange(3, device=weight.device)
    positions = torch.arange(3, device=weight.device)
    # The class's own forward: calling the module would enter its compiled version.
    arguments = [input_ids, positions, *[None] * (len(_positional(type(decoder).forward)) - 3)]
    try:
        with torch.inference_mode(), _stand_in_layers(decoder, positions):
            expected = type(decoder).forward(decoder, *arguments)
            _, _, actual = network.first(input_ids, positions, network.num_layers)
    except _UnknownLayerCall as call:
        needed = "layer(positions, hidden_states, residual)"
        raise _refusal(name, f"it calls its layers as {call}, where {needed} is needed") from None
    except Exception as error:
        # Whatever a model's own code raises here, it is not of the form that was tried.
        reason = f"its decoder is not of the form that 'del' runs ({type(error).__name__}: {error})"
        raise _refusal(name, reason) from error
    if isinstance(expected, tuple):
        expected = expected[0]
    if not isinstance(actual, torch.Tensor):
        raise _refusal(name, "its norm gives more than one tensor, where one is needed")
    if _changed_after_the_decoder(network.target, input_ids, positions, actual):
        raise _refusal(name, "it changes what its decoder gives before the LM head")
    # Both did the same operations on nearly the same numbers, so anything but rounding is a difference in kind.
    rounding = max(1e-3, 4 * torch.finfo(expected.dtype).eps)
    same_shape = expected.shape == actual.shape
    if not same_shape or (expected - actual).abs().max() > rounding * expected.abs().max():
        raise _refusal(name, "its forward is not just embedding, layers and norm(hidden, residual)")


def _refusal(name: str, reason: str) -> ValueError:
    return ValueError(f"{name} cannot draft for itself: {reason}. Serve it without the speculative method 'del'")


def _changed_after_the_decoder(
    target: nn.Module, input_ids: torch.Tensor, positions: torch.Tensor, states: torch.Tensor
) -> bool:
    """Whether the target does something to its decoder's output (MiniCPM scales it), which the head would miss."""

    class Decoder(nn.Module):
        def forward(self, *_: Any, **__: Any) -> torch.Tensor:
            return states

    decoder = target.model
    target.model = Decoder()
    try:
        with torch.inference_mode():
            return not torch.equal(type(target).forward(target, input_ids, positions), states)
    finally:
        target.model = decoder


class _UnknownLayerCall(Exception):
    """A layer was called in a way the network does not know."""


@contextmanager
def _stand_in_layers(decoder: nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Every layer of `decoder` replaced by a cheap function of its index, its inputs and `positions`."""

    def stand_in(index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            # An option the model leaves unset (Mistral's t_cond=None) is one the network may leave out.
            options = {key: value for key, value in kwargs.items() if value is not None}
            if options or len(args) != 3 or args[0] is not positions or not _is_state(args[1], positions):
                given = [_describe(value, positions) for value in args] + [f"{key}=..." for key in options]
                raise _UnknownLayerCall(f"layer({', '.join(given)})")
            _, hidden_states, residual = args
            residual = hidden_states if residual is None else hidden_states + residual
            # In proportion to the residual, so that a scale the network does not know shows at any size of weights.
            size = residual.abs().mean()
            step = size * torch.cos(residual / size.clamp_min(1e-12) + positions.unsqueeze(-1) + index)
            return step.to(hidden_states.dtype), residual

        return forward

    with ExitStack() as stack:
        for index, layer in enumerate(decoder.layers):
            # vLLM's offloaders put a forward of their own on a layer: it has to be there again afterwards.
            own = vars(layer).get("forward")
            layer.forward = stand_in(index)
            stack.callback(setattr, layer, "forward", own) if own else stack.callback(delattr, layer, "forward")
        yield


def _is_state(value: Any, positions: torch.Tensor) -> bool:
    """Whether `value` can be hidden states [rows, hidden size]."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape[:-1] == positions.shape


def _describe(value: Any, positions: torch.Tensor) -> str:
    """A layer's argument, for the message."""
    if value is positions:
        return "positions"
    return "hidden_states" if _is_state(value, positions) else f"<{type(value).__name__}>"


def _positional(function: Any) -> list[str]:
    """The names of the positional parameters of `function`."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds]
