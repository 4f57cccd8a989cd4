"""Every architecture is either lossless under `del` or refused at start-up with the reason."""

from pathlib import Path

import pytest

from tests.engine.checkpoints import checkpoint
from tests.engine.host import Host

SERVED = [
    "llama",
    "llama-tied",
    "qwen2",
    "qwen3",
    "mistral-sliding",
    "gemma",
    "gemma2",
    "gemma3",
    "mixtral",
    "qwen3-moe",
    "phi3",
]
REFUSED = {
    "granite": r"GraniteForCausalLM cannot draft for itself: it calls its layers as layer\(positions, hidden_states\)",
    "gpt2": "GPT2LMHeadModel cannot draft for itself: its decoder has no `embed_input_ids`",
}
# Without hidden states of early layers, which the dynamic policy learns from; served with the fixed one.
FIXED_ONLY = ["gemma", "gemma2", "gemma3", "mixtral"]
PROMPTS = [[5], [7, 8, 9, 10, 11], list(range(20, 70)), [9, 4] * 60]
# Fewer tokens on V2, which runs in Triton's interpreter here; beyond the sliding windows all the same.
GREEDY = {
    runner: {"temperature": 0, "max_tokens": tokens, "ignore_eos": True} for runner, tokens in (("v1", 32), ("v2", 20))
}

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("architecture", SERVED)
def test_lossless(host: Host, checkpoints: Path, architecture: str) -> None:
    """Greedy output in float32 is that of vLLM without speculation, and drafts are accepted on the way."""
    model = checkpoint(checkpoints, architecture)
    policy = {"del_policy": "fixed"} if architecture in FIXED_ONLY else {}
    greedy = GREEDY[host.runner]
    off = host.generate(model, PROMPTS, greedy)
    on = host.generate(model, PROMPTS, greedy, {"method": "del", "del_exit_layers": 2, **policy})
    assert on.completions == off.completions
    assert on.accepted > 0
    assert on.steps < off.steps


@pytest.mark.parametrize("architecture", FIXED_ONLY)
def test_dynamic_refused(host: Host, checkpoints: Path, architecture: str) -> None:
    with pytest.raises(ValueError, match=r"does not hand out hidden states of early layers.*set del_policy='fixed'"):
        host.generate(checkpoint(checkpoints, architecture), [[5]], GREEDY[host.runner], "del")


@pytest.mark.parametrize("architecture", REFUSED)
def test_refused(host: Host, checkpoints: Path, architecture: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[architecture]):
        host.generate(
            checkpoint(checkpoints, architecture), [[5]], GREEDY[host.runner], {"method": "del", "del_policy": "fixed"}
        )
