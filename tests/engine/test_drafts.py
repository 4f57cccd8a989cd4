"""What is drafted is what the model, cut off at the exit layer, would say after the same text."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.checkpoints import checkpoint
from tests.engine.host import Host

PROMPT = [11, 45, 7, 7, 102, 9, 64, 33]
LENGTH = 48

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(("exit_layer", "num_tokens"), [(1, 4), (2, 3), (3, 6)])
def test_drafts_are_those_of_the_truncated_model(
    host: Host, checkpoints: Path, exit_layer: int, num_tokens: int
) -> None:
    """Counts of drafted and accepted tokens equal those of an independent simulation, without KV cache.

    Wrong positions, a stale or misplaced KV entry or a wrong exit would still be lossless, and lower these counts.
    """
    model = checkpoint(checkpoints, "llama")
    sampling = {"temperature": 0, "max_tokens": LENGTH, "ignore_eos": True}
    spec = {"method": "del", "del_exit_layers": exit_layer, "num_speculative_tokens": num_tokens}
    outcome = host.generate(model, [PROMPT], sampling, spec)
    (completion,) = outcome.completions[0]
    assert (outcome.drafted, outcome.accepted) == _simulate(
        model, exit_layer, num_tokens, [*PROMPT, *completion.token_ids]
    )
    assert 0 < outcome.accepted < outcome.drafted


@torch.inference_mode()
def _simulate(path: str, exit_layer: int, num_tokens: int, text: list[int]) -> tuple[int, int]:
    """Tokens drafted and accepted while `text` is generated after `PROMPT`; the first token needs no draft."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.model.layers = model.model.layers[:exit_layer]
    model.config.num_hidden_layers = exit_layer
    drafted = accepted = 0
    known = len(PROMPT) + 1
    while known < len(text):
        context = text[:known]
        for _ in range(num_tokens):
            logits = model(torch.tensor([context]), use_cache=False).logits
            context = [*context, int(logits[0, -1].argmax())]
        drafts = context[known:]
        hits = next((i for i in range(num_tokens) if text[known + i : known + i + 1] != [drafts[i]]), num_tokens)
        drafted += num_tokens
        accepted += hits
        known += hits + 1
    return drafted, accepted
