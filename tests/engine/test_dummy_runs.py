"""Batches that are not requests: vLLM's dummy runs, and the padding that data-parallel ranks agree on."""

from collections.abc import Callable, Iterator
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

pytestmark = pytest.mark.engine


@pytest.fixture
def in_step(host: Host) -> Iterator[Callable[[str, dict[str, Any], int | None], None]]:
    """Tells a drafter that it goes in step with other ranks, the largest of which has so many rows; None: with some."""
    told: list[tuple[str, dict[str, Any]]] = []

    def tell(model: str, spec: dict[str, Any], num_rows: int | None) -> None:
        told.append((model, spec))
        host.call(_go_in_step, model, spec, num_rows)

    yield tell
    for of in told:
        host.call(_go_alone, *of)


def test_a_dummy_run_drafts_without_touching_the_kv_cache(host: Host, checkpoints: Path, in_step: Any) -> None:
    """A data-parallel rank without work runs one, drafts included, in step with the others."""
    model = checkpoint(checkpoints, "llama")
    before = host.generate(model, PROMPTS, GREEDY, SPEC)
    assert before.accepted > 0
    in_step(model, SPEC, None)
    assert host.call(_dummy_run, model) == {"steps": 6, "unchanged": True}
    assert host.generate(model, PROMPTS, GREEDY, SPEC).completions == before.completions


@pytest.mark.parametrize("spec", [SPEC, FIXED], ids=["dynamic", "fixed"])
def test_rows_padded_to_what_the_ranks_agreed_on(
    host: Host, checkpoints: Path, in_step: Any, spec: dict[str, Any]
) -> None:
    """Padding rows are computed along and change nothing."""
    model = checkpoint(checkpoints, "llama")
    plain = host.generate(model, PROMPTS, GREEDY, spec)
    in_step(model, spec, 5)
    padded = host.generate(model, PROMPTS, GREEDY, spec)
    assert host.call(_widths, model, spec) == {5}
    assert padded.completions == plain.completions
    assert padded.accepted > 0
    if spec is FIXED:  # the other one has learnt something in between
        assert (padded.drafted, padded.accepted) == (plain.drafted, plain.accepted)


def _runner(model: str, spec: dict[str, Any] = SPEC) -> Any:
    engine = engines._engine(model, spec, {})
    return engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def _drafter(model: str, spec: dict[str, Any] = SPEC) -> Any:
    runner = _runner(model, spec)
    return runner.speculator if hasattr(runner, "speculator") else runner.drafter


def _dummy_run(model: str) -> dict[str, Any]:
    """In the engine's process: the draft steps of a dummy run, and whether the KV cache is as before."""
    import torch

    runner, drafter = _runner(model), _drafter(model)
    drafter.widths.clear()
    before = [cache.clone() for cache in runner.kv_caches]
    runner._dummy_run(6)
    same = all(torch.equal(a, b) for a, b in zip(before, runner.kv_caches, strict=True))
    return {"steps": len(drafter.widths), "unchanged": same}


def _go_in_step(model: str, spec: dict[str, Any], num_rows: int | None) -> None:
    """In the engine's process, from here on: rounds are padded to `num_rows` as ranks agree; notes rows of steps."""
    import torch
    from vllm.v1.worker.gpu.dp_utils import DPSyncState

    drafter = _drafter(model, spec)
    drafter.widths, drafter.first_segment = [], drafter.segments[0]
    drafter.kept = dict(vars(drafter))

    def watched(input_ids: Any, positions: Any) -> Any:
        drafter.widths.append(len(input_ids))
        return drafter.first_segment(input_ids, positions)

    drafter.segments[0] = watched
    if hasattr(drafter, "alone"):
        drafter.alone = drafter.compact = False
    if num_rows is None:
        return
    agreed, propose = torch.tensor([num_rows]), drafter.propose
    if hasattr(drafter, "alone"):
        drafter._determine_batch_execution_and_padding = lambda _: (None, num_rows, agreed)
        return

    def propose_with_others(*args: Any, **kwargs: Any) -> Any:
        kwargs["dp_sync_state"] = DPSyncState(
            num_tokens_across_dp=agreed, num_reqs=num_rows, uniform_token_count=1, eager=True
        )
        return propose(*args, **kwargs)

    drafter.propose = propose_with_others


def _go_alone(model: str, spec: dict[str, Any]) -> None:
    """In the engine's process: as before `_go_in_step`."""
    drafter = _drafter(model, spec)
    drafter.segments[0] = drafter.first_segment
    kept = drafter.kept
    vars(drafter).clear()
    vars(drafter).update(kept)


def _widths(model: str, spec: dict[str, Any]) -> set[int]:
    return set(_drafter(model, spec).widths)
