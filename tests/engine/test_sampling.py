"""Sampled output follows the same distribution with and without `del`."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from tests.engine.checkpoints import checkpoint
from tests.engine.host import Host

LENGTH = 3
PROMPT = [4, 6, 5, 7]
SPEC = {"method": "del", "del_exit_layers": 2, "num_speculative_tokens": 3}
# V2 runs in Triton's interpreter here, some hundred times slower: its samples show gross faults only.
SAMPLES = {"v1": 24_000, "v2": 400}
ENGINE = {"max_num_seqs": 64, "max_num_batched_tokens": 512, "max_model_len": 32}

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model(checkpoints: Path) -> str:
    """A vocabulary of eight tokens: joint distributions of three of them can be counted."""
    return checkpoint(checkpoints, "llama", vocab_size=8, seed=1)


def sample(host: Host, model: str, sampling: dict[str, Any], spec: Any) -> tuple[Counter[tuple[int, ...]], int]:
    """Counts of the first `LENGTH` tokens over many samples, and the tokens accepted on the way."""
    params = {**sampling, "max_tokens": LENGTH, "ignore_eos": True, "detokenize": False}
    outcome = host.generate(model, [PROMPT] * SAMPLES[host.runner], params, spec, **ENGINE)
    return Counter(completion.token_ids for (completion,) in outcome.completions), outcome.accepted


def p_value(first: Counter[tuple[int, ...]], second: Counter[tuple[int, ...]]) -> float:
    """Of the hypothesis that both were drawn from one distribution; outcomes seen too rarely are pooled."""
    rows = [(first[key], second[key]) for key in first | second]
    common = [row for row in rows if sum(row) >= 20]
    rare = np.sum([row for row in rows if sum(row) < 20] or [(0, 0)], axis=0)
    table = np.array([*common, rare] if rare.sum() >= 20 else common)
    return float(chi2_contingency(table.T).pvalue)


CASES = [
    ("v1", {"temperature": 1.0}),
    ("v1", {"temperature": 0.7}),
    ("v1", {"temperature": 1.0, "top_p": 0.8}),
    ("v1", {"temperature": 0.7, "top_k": 4}),
    ("v2", {"temperature": 0.7, "top_p": 0.9}),
]


@pytest.mark.parametrize(("host", "sampling"), CASES, indirect=["host"], ids=str)
def test_same_joint_distribution(host: Host, model: str, sampling: dict[str, Any]) -> None:
    off, _ = sample(host, model, sampling, None)
    on, accepted = sample(host, model, sampling, SPEC)
    assert accepted > 0
    assert len(on) > 10
    assert p_value(off, on) > 1e-4


@pytest.mark.parametrize("host", ["v1"], indirect=True)
def test_a_wrong_rejection_rule_is_noticed(host: Host, model: str) -> None:
    """The test above has the power it needs: drafts accepted a few percent too often fail it."""
    off, _ = sample(host, model, {"temperature": 1.0}, None)
    host.call(_favour_drafts, 1.2)
    try:
        on, _ = sample(host, model, {"temperature": 1.0}, SPEC)
    finally:
        host.call(_favour_drafts, 1.0)
    assert p_value(off, on) < 1e-4


def _favour_drafts(factor: float) -> None:
    """In the engine's process: multiply the odds of every drafted token by `factor`."""
    import math

    import vllm.v1.sample.rejection_sampler as sampler

    original = getattr(sampler.rejection_sample, "original", sampler.rejection_sample)

    def rejection_sample(draft_token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        args_list: list[Any] = list(args)
        logits_at = 4
        logits = args_list[logits_at].clone()
        rows: Sequence[int] = range(len(draft_token_ids))
        logits[list(rows), draft_token_ids.long()] += math.log(factor)
        args_list[logits_at] = logits
        return original(draft_token_ids, *args_list, **kwargs)

    rejection_sample.original = original  # type: ignore[attr-defined]
    sampler.rejection_sample = rejection_sample
