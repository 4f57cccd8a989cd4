"""Sampled output follows the same distribution with and without `del`."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare
from transformers import AutoModelForCausalLM

from tests.engine.checkpoints import checkpoint
from tests.engine.host import Host

# V2 runs in Triton's interpreter here, some hundred times slower: fewer outcomes to tell apart, from fewer samples.
VOCAB = {"v1": 8, "v2": 4}
# The first token is the prompt's; two drafts follow, or one and what replaces it.
LENGTH = 3
SAMPLES = {"v1": 12_000, "v2": 2_000}
# Of them, as few rows at a time take long.
PART = {"fixed": 1.0, "tpl": 1.0, "goodput": 0.5}
# All draft from the first round on; the second ends drafts by their confidence, the third is what users get.
POLICIES = {"fixed": {"del_policy": "fixed"}, "tpl": {"del_objective": "tpl"}, "goodput": {}}
# At a time. By the costs of these tests drafts for more rows do not pay, which the third minds.
ROWS = {"fixed": 128, "tpl": 128, "goodput": 8}
# The odds of a draft that a wrong rule accepts by. A token of probability 0.5 is then accepted at 0.545, or 0.583: by
# simulation, that many samples miss it less than once in a thousand times.
WRONG_ODDS = {"v1": 1.2, "v2": 1.4}
# Below this probability of chance a distribution counts as another one.
CHANCE = 1e-3
PROMPT = [2, 0, 1, 3]
ENGINE = {"max_num_batched_tokens": 1024, "max_model_len": 32, "num_gpu_blocks_override": 300}

# V2's thousands of samples take minutes, and on a busy machine more than ten.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]


def spec(policy: str) -> dict[str, Any]:
    return {"method": "del", **POLICIES[policy], "del_exit_layers": 2, "num_speculative_tokens": LENGTH - 1}


@pytest.fixture
def model(host: Host, checkpoints: Path) -> str:
    """A vocabulary so small that joint distributions of a few tokens can be counted."""
    return checkpoint(checkpoints, "llama", vocab_size=VOCAB[host.runner], seed=1)


def sample(
    host: Host, model: str, sampling: dict[str, Any], spec: Any, rows: int = 128, part: float = 1.0
) -> tuple[Counter[tuple[int, ...]], int]:
    """Counts of the first tokens over many samples, and the tokens accepted on the way."""
    # One token more, as a draft has to leave one for the verification.
    params = {**sampling, "max_tokens": LENGTH + 1, "ignore_eos": True, "detokenize": False}
    host.call(_seed)
    outcome = host.generate(
        model, [PROMPT] * int(part * SAMPLES[host.runner]), params, spec, max_num_seqs=rows, **ENGINE
    )
    return Counter(completion.token_ids[:LENGTH] for (completion,) in outcome.completions), outcome.accepted


@torch.inference_mode()
def exact(path: str, sampling: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """The joint distribution of the first tokens without speculation, computed, not sampled."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    joint: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        texts = torch.tensor([[*PROMPT, *text] for text in joint])
        logits = model(texts, use_cache=False).logits[:, -1].double() / sampling["temperature"]
        ranked, order = logits.sort(descending=True)
        ranked[:, sampling.get("top_k", len(ranked[0])) :] = -torch.inf
        before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
        ranked[before >= sampling.get("top_p", 1.0)] = -torch.inf
        chances = torch.zeros_like(ranked).scatter(1, order, ranked.softmax(-1))
        joint = {
            (*text, token): before * chance
            for (text, before), row in zip(joint.items(), chances.tolist(), strict=True)
            for token, chance in enumerate(row)
            if chance > 0
        }
    return joint


def _seed() -> None:
    """In the engine's process: the same samples at each run, whatever ran before."""
    import random

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)


def p_value(counts: Counter[tuple[int, ...]], expected: Mapping[tuple[int, ...], float]) -> float:
    """Of the hypothesis that `counts` were drawn from `expected`: counts too, or probabilities.

    Outcomes seen too rarely for a chi-square test are pooled.
    """
    sampled = isinstance(expected, Counter)
    scale = 1 if sampled else counts.total()
    assert sampled or counts.keys() <= expected.keys()
    rows = [(counts[key], expected[key] * scale) for key in counts.keys() | expected.keys()]
    common = [row for row in rows if row[1] >= 10]
    rare = np.sum([row for row in rows if row[1] < 10] or [(0, 0)], axis=0)
    observed, wanted = np.array([*common, rare] if rare.any() else common).T
    return float(chi2_contingency([observed, wanted]).pvalue if sampled else chisquare(observed, wanted).pvalue)


CASES = [
    ("v1", {"temperature": 1.0}, "fixed"),
    ("v1", {"temperature": 0.7}, "tpl"),
    ("v1", {"temperature": 1.0, "top_p": 0.8}, "goodput"),
    ("v1", {"temperature": 0.7, "top_k": 4}, "fixed"),
    ("v2", {"temperature": 1.0}, "tpl"),
    ("v2", {"temperature": 0.7, "top_p": 0.9, "top_k": 3}, "fixed"),
]


@pytest.mark.parametrize(("host", "sampling", "policy"), CASES, indirect=["host"], ids=str, scope="session")
def test_same_joint_distribution(host: Host, model: str, sampling: dict[str, Any], policy: str) -> None:
    """`del`'s samples have the computed distribution; on V1, that is also what vLLM samples without `del`."""
    on, accepted = sample(host, model, sampling, spec(policy), ROWS[policy], PART[policy])
    assert accepted > 0
    assert len(on) > 3
    expected = exact(model, sampling)
    assert p_value(on, expected) > CHANCE
    if host.runner == "v1":
        off, _ = sample(host, model, sampling, None, part=PART[policy])
        assert p_value(off, expected) > CHANCE
        assert p_value(on, off) > CHANCE


def test_a_wrong_rejection_rule_is_noticed(host: Host, model: str) -> None:
    """The tests above have the power they need: drafts accepted a few percent too often fail them."""
    host.call(_favour_drafts, host.runner, WRONG_ODDS[host.runner])
    try:
        on, _ = sample(host, model, {"temperature": 1.0}, spec("fixed"))
    finally:
        host.call(_favour_drafts, host.runner, None)
    assert p_value(on, exact(model, {"temperature": 1.0})) < CHANCE


def _favour_drafts(runner: str, factor: float | None) -> None:
    """In the engine's process: accept each draft as if its odds were `factor` times what they are; `None` ends it.

    Only acceptance is wrong: what replaces a rejected draft is drawn from the other tokens, whatever its odds.
    """
    import math
    from importlib import import_module

    v1 = runner == "v1"
    sampler = import_module(
        "vllm.v1.sample.rejection_sampler" if v1 else "vllm.v1.worker.gpu.spec_decode.rejection_sampler"
    )
    original = getattr(sampler.rejection_sample, "original", sampler.rejection_sample)
    sampler.rejection_sample = original
    if factor is None:
        return
    shift = math.log(factor)

    def with_v1(drafts: Any, counts: Any, longest: Any, ends: Any, probs: Any, logits: Any, *rest: Any, **options: Any):
        logits = logits.clone()
        logits[range(len(drafts)), drafts.long()] += shift
        return original(drafts, counts, longest, ends, probs, logits, *rest, **options)

    def with_v2(logits: Any, probs: Any, fed: Any, starts: Any, *rest: Any, **options: Any) -> Any:
        logits = logits.clone()
        last = set((starts[1:] - 1).tolist())  # of each request: verifies no draft
        for row in set(range(len(logits))) - last:
            logits[row, fed[row + 1].long()] += shift
        return original(logits, probs, fed, starts, *rest, **options)

    wrong = with_v1 if v1 else with_v2
    wrong.original = original  # type: ignore[attr-defined]
    sampler.rejection_sample = wrong
