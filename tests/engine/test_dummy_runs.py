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

pytestmark = [pytest.mark.engine, pytest.mark.parametrize("host", ["v2"], indirect=True)]


def test_a_dummy_run_drafts_without_touching_the_kv_cache(host: Host, checkpoints: Path) -> None:
    """A data-parallel rank without work runs one, drafts included, in step with the others."""
    model = checkpoint(checkpoints, "llama")
    before = host.generate(model, PROMPTS, GREEDY, SPEC)
    assert host.call(_dummy_run, model) == {"steps": 4, "unchanged": True}
    assert host.generate(model, PROMPTS, GREEDY, SPEC).completions == before.completions


def test_rows_padded_to_what_the_ranks_agreed_on(host: Host, checkpoints: Path) -> None:
    """Padding rows are computed along and change nothing."""
    model = checkpoint(checkpoints, "llama")
    plain = host.generate(model, PROMPTS, GREEDY, SPEC)
    host.call(_pad_drafts_to, model, 5)
    try:
        padded = host.generate(model, PROMPTS, GREEDY, SPEC)
        assert host.call(_widths, model) == {5}
    finally:
        host.call(_pad_drafts_to, model, None)
    assert padded.completions == plain.completions
    assert (padded.drafted, padded.accepted) == (plain.drafted, plain.accepted)


def _runner(model: str) -> Any:
    engine = engines._engine(model, SPEC, {})
    return engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def _dummy_run(model: str) -> dict[str, Any]:
    """In the engine's process: the draft steps of a dummy run, and whether the KV cache is as before."""
    import torch

    runner = _runner(model)
    network = runner.speculator.model
    calls: list[int] = []
    handle = network.register_forward_hook(lambda *_: calls.append(1))
    before = [cache.clone() for cache in runner.kv_caches]
    runner._dummy_run(6)
    handle.remove()
    same = all(torch.equal(a, b) for a, b in zip(before, runner.kv_caches, strict=True))
    return {"steps": len(calls), "unchanged": same}


def _pad_drafts_to(model: str, num_rows: int | None) -> None:
    """In the engine's process: every `propose` is told that the largest rank has `num_rows` rows."""
    import torch
    from vllm.v1.worker.gpu.dp_utils import DPSyncState

    speculator = _runner(model).speculator
    if num_rows is None:
        del speculator.propose
        speculator.hook.remove()
        return
    original = speculator.propose
    speculator.widths = set()
    speculator.hook = speculator.model.register_forward_pre_hook(lambda _, args: speculator.widths.add(len(args[0])))

    def propose(*args: Any, **kwargs: Any) -> Any:
        kwargs["dp_sync_state"] = DPSyncState(
            num_tokens_across_dp=torch.tensor([num_rows]), num_reqs=num_rows, uniform_token_count=1, eager=True
        )
        return original(*args, **kwargs)

    speculator.propose = propose


def _widths(model: str) -> set[int]:
    return _runner(model).speculator.widths
