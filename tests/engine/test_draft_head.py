"""Drafts through less of the LM head: counted tokens, a copy in FP8. Output is the same, and drafts are accepted."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.engine import host as engines
from tests.engine.checkpoints import VOCAB, checkpoint
from tests.engine.host import Host
from tests.engine.test_drafts import drafter_of

SIZE = 30
DYNAMIC = {"method": "del", "del_exit_layers": [1, 3], "num_speculative_tokens": 3, "del_objective": "tpl"}
FIXED = {"method": "del", "del_exit_layers": 2, "num_speculative_tokens": 3, "del_policy": "fixed"}
PROMPTS = [[5 + i, *range(20, 40, 1 + i)] for i in range(8)]
GREEDY = {"temperature": 0, "max_tokens": 30, "ignore_eos": True}

pytestmark = pytest.mark.engine


def _head(model: str, spec: dict[str, Any]) -> tuple[str, Any]:
    drafter = drafter_of(engines._engine(model, spec, {}))
    return str(drafter.head), drafter.counted and drafter.counted.tokens.tolist()


def _list_soon(model: str, spec: dict[str, Any]) -> None:
    """In the engine's process: have its tokens listed after a hundred rounds of a sequence."""
    drafter_of(engines._engine(model, spec, {})).counted._left = 100


@pytest.mark.parametrize("policy", [DYNAMIC, FIXED], ids=["dynamic", "fixed"])
def test_counted_tokens(host: Host, checkpoints: Path, policy: dict[str, Any]) -> None:
    """After some rounds drafts are of those that were generated most often."""
    model, spec = checkpoint(checkpoints, "llama"), {**policy, "del_draft_vocab": SIZE}
    host.call(_list_soon, model, spec)
    expected = host.generate(model, PROMPTS, GREEDY)
    label, before = host.call(_head, model, spec)
    assert label == {"v1": "LM head", "v2": "fused LM head"}[host.runner] + f" over {SIZE} tokens"
    assert before == list(range(SIZE))
    first = host.generate(model, PROMPTS, GREEDY, spec)
    runs = [first]
    while host.call(_head, model, spec)[1] == before:
        runs.append(host.generate(model, PROMPTS, GREEDY, spec))
        assert len(runs) < 9, "nothing is counted"
    # Listed while the texts were not at their end: nearly what would be best for all of them.
    often = Counter(token for (c,) in expected.completions for token in c.token_ids)
    covered = sum(often[token] for token in host.call(_head, model, spec)[1])
    assert covered > 0.9 * sum(number for _, number in often.most_common(SIZE))
    after = host.generate(model, PROMPTS, GREEDY, spec)
    assert all(run.completions == expected.completions for run in (*runs, after))
    assert after.accepted > 1.2 * first.accepted


@pytest.mark.parametrize("listed", [None, VOCAB // 2])
@pytest.mark.parametrize("host", ["v2"], indirect=True)
def test_in_fp8(host: Host, checkpoints: Path, listed: int | None) -> None:
    model, spec = checkpoint(checkpoints, "llama"), {**DYNAMIC, "del_draft_vocab": listed}
    expected = host.generate(model, PROMPTS[:4], GREEDY)
    own = host.generate(model, PROMPTS[:4], GREEDY, spec)
    fp8 = host.generate(model, PROMPTS[:4], GREEDY, {**spec, "del_draft_head": "fp8"})
    assert "in FP8" in host.call(_head, model, {**spec, "del_draft_head": "fp8"})[0]
    assert fp8.completions == own.completions == expected.completions
    assert fp8.accepted > 0.8 * own.accepted > 0


def _refusal(model: str, spec: dict[str, Any], tampered: bool = False) -> str:
    """What the start of an engine fails with; `tampered`: of a model that does more to its logits."""
    from vllm.model_executor.models.llama import LlamaForCausalLM

    plain = LlamaForCausalLM.compute_logits
    if tampered:
        LlamaForCausalLM.compute_logits = lambda self, states: plain(self, states).roll(1, -1)
    try:
        engines._engine(model, spec, {})
    except ValueError as error:
        return str(error)
    finally:
        LlamaForCausalLM.compute_logits = plain
    return "it has started"


@pytest.mark.parametrize("host", ["v1"], indirect=True)
def test_fp8_without_a_gpu(host: Host, checkpoints: Path) -> None:
    said = host.call(_refusal, checkpoint(checkpoints, "llama"), {**FIXED, "del_draft_head": "fp8"})
    assert said == (
        "del_draft_head='fp8': an LM head in FP8 needs a GPU of compute capability 8.9 or more; leave it out"
    )


def test_a_head_that_is_no_matrix(host: Host, checkpoints: Path) -> None:
    said = host.call(_refusal, checkpoint(checkpoints, "llama"), {**FIXED, "del_draft_vocab": SIZE - 1}, True)
    assert said == f"del_draft_vocab={SIZE - 1}: the LM head of LlamaForCausalLM is not a plain matrix; leave it out"
