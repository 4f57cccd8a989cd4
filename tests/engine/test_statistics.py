"""What the dynamic policy learns is what an independent simulation of the model, cut off at each exit, counts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine import host as engines
from tests.engine.checkpoints import checkpoint
from tests.engine.host import Arrival, Host
from tests.engine.test_drafts import drafter_of

EXITS = [1, 2, 3]
LENGTH = 4
SEEDED = 32
# Of one token, of fewer than are seeded, and of several chunks of 48, the last of which is shorter than what is seeded.
PROMPTS = [[5], [11, 45, 7, 7, 102, 9, 64, 33], [(7 * i) % 150 + 5 for i in range(110)]]
GREEDY = {"temperature": 0, "max_tokens": 30, "ignore_eos": True}
SPEC = {"method": "del", "del_objective": "tpl", "del_exit_layers": EXITS, "num_speculative_tokens": LENGTH}
CHUNK = 48

pytestmark = pytest.mark.engine


def test_counts_are_those_of_the_truncated_models(host: Host, checkpoints: Path) -> None:
    """Without fading every token generated counts once for every exit, whatever was drafted and accepted."""
    model = checkpoint(checkpoints, "llama")
    host.call(_stop_fading, model)
    # One after the other, so that each has the chunks that are expected here.
    arrivals = [Arrival(prompt, GREEDY, step=60 * i) for i, prompt in enumerate(PROMPTS)]
    outcome = host.serve(model, arrivals, SPEC, max_num_batched_tokens=CHUNK)
    assert outcome.accepted > 0
    counts = host.call(_counts, model, len(PROMPTS))
    for prompt, (completion,), counted in zip(PROMPTS, outcome.completions, counts, strict=True):
        last_chunk = (len(prompt) - 1) % CHUNK + 1
        seeds = range(max(len(prompt) - 1 - SEEDED, len(prompt) - last_chunk), len(prompt) - 1)
        # The last round may have accepted tokens past the end; how many follows from how many were counted.
        generated = int(sum(counted[0])) - len(seeds)
        assert 0 <= generated - len(completion.token_ids) <= 2 * (1 + LENGTH)
        text = (*prompt, *completion.token_ids)
        assert counted == _simulate(model, text, [*seeds, *range(len(prompt) - 1, len(prompt) - 1 + generated)])


def test_a_new_request_in_an_old_place_starts_anew(host: Host, checkpoints: Path) -> None:
    """More requests than there are slots: nothing of those before is left in what the last ones count."""
    model = checkpoint(checkpoints, "llama")
    host.call(_stop_fading, model)
    arrivals = [Arrival([5 + i, 9], {**GREEDY, "max_tokens": 3}, step=2 * i) for i in range(40)]
    host.serve(model, arrivals, SPEC, max_num_batched_tokens=CHUNK)
    for counted in host.call(_counts, model, 4):
        # Of the prompt, of the token after it, and of the last round; asynchronous scheduling runs one more.
        assert 0 < sum(counted[0]) <= 1 + 1 + 2 * (1 + LENGTH)


def _drafter(model: str) -> Any:
    return drafter_of(engines._engine(model, SPEC, {"max_num_batched_tokens": CHUNK}))


def _stop_fading(model: str) -> None:
    """In the engine's process."""
    _drafter(model).policy.statistics.decay = 1.0


def _counts(model: str, requests: int) -> list[list[list[float]]]:
    """(matches, mismatches) by exit of the requests that came last, in their order."""
    drafter = _drafter(model)
    slots = list(drafter.slots_of._slots.values())[-requests:]
    return drafter.policy.statistics._counts[slots].tolist()


@torch.inference_mode()
def _simulate(path: str, text: tuple[int, ...], positions: list[int]) -> list[list[float]]:
    """(matches, mismatches) by exit at `positions`, of which the last may be past the end of `text`."""
    target = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def choices(model: Any, tokens: tuple[int, ...]) -> list[int]:
        return model(torch.tensor([tokens]), use_cache=False).logits[0].argmax(-1).tolist()

    while len(text) <= positions[-1]:
        text = (*text, choices(target, text)[-1])
    wanted, counted = choices(target, text), []
    for depth in EXITS:
        early = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        early.model.layers = early.model.layers[:depth]
        early.config.num_hidden_layers = depth
        said = choices(early, text)
        matches = sum(said[at] == wanted[at] for at in positions)
        counted.append([float(matches), float(len(positions) - matches)])
    return counted
