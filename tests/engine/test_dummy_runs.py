"""Batches that are not requests: vLLM's dummy runs, and the padding that data-parallel ranks agree on."""

from pathlib import Path
from typing import Any

import pytest

from tests.engine import host as engines
from tests.engine.checkpoints import checkpoint
from tests.engine.host import Host

PROMPTS = [[5, 6, 7], list(range(20, 60))]
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
SPEC = {"method": "del", "del_exit_layers": 2}
FIXED = {**SPEC, "del_policy": "fixed"}

pytestmark = [pytest.mark.engine, pytest.mark.parametrize("host", ["v2"], indirect=True)]


def test_a_dummy_run_drafts_without_touching_the_kv_cache(host: Host, checkpoints: Path) -> None:
    """A data-parallel rank without work runs one, drafts included, in step with the others."""
    model = checkpoint(checkpoints, "llama")
    before = host.generate(model, PROMPTS, GREEDY, SPEC)
    assert before.accepted > 0
    assert host.call(_dummy_run, model) == {"steps": 6, "unchanged": True}
    assert host.generate(model, PROMPTS, GREEDY, SPEC).completions == before.completions


@pytest.mark.parametrize("spec", [SPEC, FIXED], ids=["dynamic", "fixed"])
def test_rows_padded_to_what_the_ranks_agreed_on(host: Host, checkpoints: Path, spec: dict[str, Any]) -> None:
    """Padding rows are computed along and change nothing."""
    model = checkpoint(checkpoints, "llama")
    plain = host.generate(model, PROMPTS, GREEDY, spec)
    host.call(_pad_drafts_to, model, spec, 5)
    try:
        padded = host.generate(model, PROMPTS, GREEDY, spec)
        assert host.call(_widths, model, spec) == {5}
    finally:
        host.call(_pad_drafts_to, model, spec, None)
    assert padded.completions == plain.completions
    assert padded.accepted > 0
    if spec is FIXED:  # the other one has learnt something in between
        assert (padded.drafted, padded.accepted) == (plain.drafted, plain.accepted)


def _runner(model: str, spec: dict[str, Any] = SPEC) -> Any:
    engine = engines._engine(model, spec, {})
    return engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def _dummy_run(model: str) -> dict[str, Any]:
    """In the engine's process: the draft steps of a dummy run, and whether the KV cache is as before."""
    import torch

    runner = _runner(model)
    widths = _watch_steps(runner.speculator)
    before = [cache.clone() for cache in runner.kv_caches]
    runner._dummy_run(6)
    runner.speculator.segments[0] = runner.speculator.first_segment
    same = all(torch.equal(a, b) for a, b in zip(before, runner.kv_caches, strict=True))
    return {"steps": len(widths), "unchanged": same}


def _watch_steps(speculator: Any) -> list[int]:
    """The number of rows of each draft step from here on."""
    widths: list[int] = []
    speculator.first_segment = first = speculator.segments[0]

    def watched(input_ids: Any, positions: Any) -> Any:
        widths.append(len(input_ids))
        return first(input_ids, positions)

    speculator.segments[0] = watched
    return widths


def _pad_drafts_to(model: str, spec: dict[str, Any], num_rows: int | None) -> None:
    """In the engine's process: every `propose` is told that the largest rank has `num_rows` rows."""
    import torch
    from vllm.v1.worker.gpu.dp_utils import DPSyncState

    speculator = _runner(model, spec).speculator
    if num_rows is None:
        del speculator.propose
        speculator.segments[0] = speculator.first_segment
        return
    original = speculator.propose
    speculator.widths = _watch_steps(speculator)

    def propose(*args: Any, **kwargs: Any) -> Any:
        kwargs["dp_sync_state"] = DPSyncState(
            num_tokens_across_dp=torch.tensor([num_rows]), num_reqs=num_rows, uniform_token_count=1, eager=True
        )
        return original(*args, **kwargs)

    speculator.propose = propose


def _widths(model: str, spec: dict[str, Any]) -> set[int]:
    return set(_runner(model, spec).speculator.widths)
