"""The check that the early-exit network computes what the target's own forward does."""

from typing import Any

import pytest
import torch
from torch import nn

from vllm_del.draft.network import EarlyExitNetwork


class Norm(nn.Module):
    """As vLLM's: a pair with a residual, which is added, and a tensor without."""

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        return hidden_states if residual is None else (hidden_states + residual, residual)


class Decoder(nn.Module):
    """A decoder of the common shape; subclasses differ in one thing each."""

    scale = 1.0

    def __init__(self, layers: int = 10) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(8, 16)
        self.layers = nn.ModuleList(nn.Identity() for _ in range(layers))
        self.norm = Norm()

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def run(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> Any:
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return self.norm(hidden_states, residual)[0]

    def forward(
        self, input_ids: Any, positions: Any, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ) -> Any:
        return self.run(self.embed_input_ids(input_ids) * self.scale, positions)


class ScaledEmbedding(Decoder):
    scale = 3.0


class SkipsALayer(Decoder):
    def run(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> Any:
        residual = None
        for layer in list(self.layers)[1:]:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return self.norm(hidden_states, residual)[0]


class OtherOrder(Decoder):
    """As gpt-oss calls its layers."""

    def run(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> Any:
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, positions, residual)
        return self.norm(hidden_states, residual)[0]


class ExtraArgument(Decoder):
    def run(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> Any:
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual, scale=2.0)
        return self.norm(hidden_states, residual)[0]


class UnsetArgument(Decoder):
    """As Mistral calls its layers."""

    def run(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> Any:
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual, t_cond=None)
        return self.norm(hidden_states, residual)[0]


class NormOfOne(Decoder):
    def run(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> Any:
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return self.norm(hidden_states)


class NormOfTwo(Decoder):
    """As Cohere's: its norm gives a pair whatever it is given."""

    class Norm(Norm):
        def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
            return hidden_states + (0 if residual is None else residual), residual

    def __init__(self) -> None:
        super().__init__()
        self.norm = self.Norm()


class Asserts(Decoder):
    def run(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> Any:
        raise AssertionError("Forward context is not set.")


class Target(nn.Module):
    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.model = decoder

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, positions)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


class ScaledOutput(Target):
    """As MiniCPM does."""

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, positions) / 3


@pytest.mark.parametrize("decoder", [Decoder, UnsetArgument])
@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
def test_accepts(decoder: type[Decoder], size: float) -> None:
    target = Target(decoder())
    target.model.embed_tokens.weight.data *= size
    network = EarlyExitNetwork.from_target(target)
    assert network.num_layers == 10
    assert not any("forward" in vars(layer) for layer in target.model.layers), "stand-ins are left behind"


@pytest.mark.parametrize(
    ("decoder", "reason"),
    [
        (ScaledEmbedding, "its forward is not just embedding, layers and norm"),
        (SkipsALayer, "its forward is not just embedding, layers and norm"),
        (NormOfOne, "its forward is not just embedding, layers and norm"),
        (OtherOrder, r"layer\(hidden_states, positions, <NoneType>\)"),
        (ExtraArgument, r"layer\(positions, hidden_states, <NoneType>, scale=...\)"),
        (NormOfTwo, "its norm gives more than one tensor"),
        (Asserts, "AssertionError: Forward context is not set"),
    ],
)
@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
def test_refuses(decoder: type[Decoder], reason: str, size: float) -> None:
    """Whatever the size of the weights: a dummy-weight load has tiny ones."""
    target = Target(decoder())
    target.model.embed_tokens.weight.data *= size
    with pytest.raises(ValueError, match=f"Target cannot draft for itself: .*{reason}.*without the speculative method"):
        EarlyExitNetwork.from_target(target)
    assert not any("forward" in vars(layer) for layer in target.model.layers), "stand-ins are left behind"


def test_refuses_what_changes_its_decoders_output() -> None:
    target = ScaledOutput(Decoder())
    with pytest.raises(ValueError, match="changes what its decoder gives before the LM head"):
        EarlyExitNetwork.from_target(target)
    assert isinstance(target.model, Decoder)


def test_a_forward_that_an_offloader_gave_a_layer_is_there_again() -> None:
    target = Target(Decoder())
    offloaded = target.model.layers[1].forward
    target.model.layers[1].forward = offloaded
    EarlyExitNetwork.from_target(target)
    assert [vars(layer).get("forward") for layer in target.model.layers[:3]] == [None, offloaded, None]


@pytest.mark.parametrize("attribute", ["embed_input_ids", "norm", "layers"])
def test_refuses_what_lacks_a_part(attribute: str) -> None:
    target = Target(nn.Module())
    for present in {"embed_input_ids", "norm", "layers"} - {attribute}:
        setattr(target.model, present, nn.ModuleList([nn.Identity(), nn.Identity()]))
    with pytest.raises(ValueError, match=f"Target cannot draft for itself: its decoder has no .*`{attribute}`"):
        EarlyExitNetwork.from_target(target)
