"""What the dynamic policy learns is what an independent simulation of the model, cut off at each exit, counts."""

import argparse
import inspect
import json
import logging
import shutil
import tarfile
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import DEMO_MODEL
from tests.engine import host as engines
from tests.engine.checkpoints import checkpoint
from tests.engine.host import Arrival, Host
from tests.engine.test_drafts import drafter_of
from vllm_del.draft.outcome import Outcome

EXITS = [1, 2, 3]
LENGTH = 4
SEEDED = 32
# Of one token, of fewer than are seeded, and of several chunks of 48, the last of which is shorter than what is seeded.
PROMPTS = [[5], [11, 45, 7, 7, 102, 9, 64, 33], [(7 * i) % 150 + 5 for i in range(110)]]
GREEDY = {"temperature": 0, "max_tokens": 30, "ignore_eos": True}
SPEC = {"method": "del", "del_objective": "tpl", "del_exit_layers": EXITS, "num_speculative_tokens": LENGTH}
CHUNK = 48
CHUNKED = {"max_num_batched_tokens": CHUNK}
LONG = {"max_model_len": 512}

pytestmark = pytest.mark.engine


def test_counts_are_those_of_the_truncated_models(host: Host, checkpoints: Path) -> None:
    """Without fading every token generated counts once for every exit, whatever was drafted and accepted."""
    model = checkpoint(checkpoints, "llama")
    host.call(_stop_fading, model, CHUNKED)
    # One after the other, so that each has the chunks that are expected here.
    arrivals = [Arrival(prompt, GREEDY, step=60 * i) for i, prompt in enumerate(PROMPTS)]
    outcome = host.serve(model, arrivals, SPEC, **CHUNKED)
    assert outcome.accepted > 0
    counts = host.call(_counts, model, CHUNKED, len(PROMPTS))
    for prompt, (completion,), counted in zip(PROMPTS, outcome.completions, counts, strict=True):
        _check(model, prompt, completion.token_ids, counted)


def test_a_preempted_request_keeps_its_counts(host: Host, checkpoints: Path) -> None:
    """It begins again with what it had generated, of which nothing is forgotten and nothing counts twice."""
    model = checkpoint(checkpoints, "llama")
    options = {"num_gpu_blocks_override": 8, "max_model_len": 128}
    host.call(_stop_fading, model, options)
    prompts = [[10 + i, *range(30, 50)] for i in range(3)]
    outcome = host.generate(model, prompts, {**GREEDY, "max_tokens": 90}, SPEC, **options)
    assert outcome.preemptions > 0
    assert outcome.accepted > 0
    counts = host.call(_counts, model, options, len(prompts))
    for prompt, (completion,), counted in zip(prompts, outcome.completions, counts, strict=True):
        _check(model, prompt, completion.token_ids, counted)


@pytest.mark.parametrize("host", ["v1"], indirect=True)
def test_expected_acceptance_is_what_happens(host: Host) -> None:
    """On real text, from a sequence's 64th token on: within 0.05 of the drafts' fate."""
    prompts = [inspect.getsource(module)[2000:2600] for module in (argparse, json, logging, shutil, tarfile, textwrap)]
    host.call(_follow_drafts)
    outcome = host.generate(str(DEMO_MODEL), prompts, {**GREEDY, "max_tokens": 200}, "del", **LONG)
    assert outcome.accepted > 0
    tried, expected, accepted = host.call(_fate, 64)
    assert tried > 200
    assert accepted / tried == pytest.approx(expected / tried, abs=0.05)


def _check(model: str, prompt: list[int], completion: tuple[int, ...], counted: list[list[float]]) -> None:
    """That `counted` is what the end of the prompt and the completion give, each token once."""
    last_chunk = (len(prompt) - 1) % CHUNK + 1
    seeds = range(max(len(prompt) - 1 - SEEDED, len(prompt) - last_chunk), len(prompt) - 1)
    # The last round may have accepted tokens past the end; how many follows from how many were counted.
    generated = int(sum(counted[0])) - len(seeds)
    assert 0 <= generated - len(completion) <= 2 * (1 + LENGTH)
    text = (*prompt, *completion)
    assert counted == _simulate(model, text, [*seeds, *range(len(prompt) - 1, len(prompt) - 1 + generated)])


def test_a_new_request_in_an_old_place_starts_anew(host: Host, checkpoints: Path) -> None:
    """More requests than there are slots: nothing of those before is left in what the last ones count."""
    model = checkpoint(checkpoints, "llama")
    host.call(_stop_fading, model, CHUNKED)
    arrivals = [Arrival([5 + i, 9], {**GREEDY, "max_tokens": 3}, step=2 * i) for i in range(40)]
    outcome = host.serve(model, arrivals, SPEC, **CHUNKED)
    last = arrivals[-4:], outcome.completions[-4:], host.call(_counts, model, CHUNKED, 4)
    for arrival, (completion,), counted in zip(*last, strict=True):
        _check(model, arrival.prompt, completion.token_ids, counted)


def test_the_clock_corrects_planning_where_the_host_sees_what_the_device_does(host: Host) -> None:
    host.generate(str(DEMO_MODEL), ["def"], {"temperature": 0, "max_tokens": 4}, "del", **LONG)
    assert host.call(_correction) == (host.runner == "v1")


def _correction() -> bool:
    """In the engine's process: whether it learns; all go by the same tables, and so by what corrects them."""
    policy = drafter_of(engines._engine(str(DEMO_MODEL), "del", LONG)).policy
    costs = policy.planner.costs
    assert costs is policy.pace._costs is policy.shadow._costs is policy.stopwatch._costs
    return policy.pace._learns


def _drafter(model: str, options: dict[str, Any]) -> Any:
    return drafter_of(engines._engine(model, SPEC, options))


def _stop_fading(model: str, options: dict[str, Any]) -> None:
    """In the engine's process."""
    _drafter(model, options).policy.statistics.decay = 1.0


def _counts(model: str, options: dict[str, Any], requests: int) -> list[list[list[float]]]:
    """(matches, mismatches) by exit of the requests that were served last, in the order of their arrival."""
    drafter = _drafter(model, options)
    last = list(drafter.slots_of._slots.items())[-requests:]
    slots = [slot for _, slot in sorted(last, key=lambda item: int(item[0].partition("-")[0]))]
    return drafter.policy.statistics._counts[slots].tolist()


def _follow_drafts() -> None:
    """In the engine's process: have the policy keep, by sequence and round, what it expects of drafts and what came."""
    policy = drafter_of(engines._engine(str(DEMO_MODEL), "del", LONG)).policy
    add, policy.followed, ages = policy._tally.add, [], Counter()

    def follow(outcome: Outcome) -> None:
        drafted = torch.minimum(outcome.verified, outcome.drafted.length)
        accepted = torch.minimum(outcome.accepted, drafted)
        rows = torch.stack((policy._outcomes_of, drafted, accepted, outcome.sampled), 1).tolist()
        for (slot, *fate, sampled), expected in zip(rows, outcome.drafted.expected.tolist(), strict=True):
            if sampled:
                policy.followed.append((ages[slot], *fate, expected))
                ages[slot] += 1 + fate[1]
        add(outcome)

    policy._tally.add = follow


def _fate(age: int) -> tuple[int, float, int]:
    """Of sequences of at least `age` tokens: drafts whose fate is known, of these the acceptances expected and had."""
    tried, expected, had = 0, 0.0, 0
    for at, drafted, accepted, rate in drafter_of(engines._engine(str(DEMO_MODEL), "del", LONG)).policy.followed:
        if at >= age:
            known = accepted + (accepted < drafted)
            tried, expected, had = tried + known, expected + known * rate, had + accepted
    return tried, expected, had


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
