"""Rounds by graph, without a GPU: what would be recorded is kept as a function of what lay in memory then.

Calling it again stands for a replay: like one, it gets nothing but what is in the buffers that it was recorded with.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.engine import host as engines
from tests.engine.checkpoints import checkpoint
from tests.engine.host import Arrival, Host

PROMPTS = [[5, 6, 7], list(range(20, 30)), [9] * 5]
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
FIXED = {"method": "del", "del_policy": "fixed", "del_exit_layers": 2, "num_speculative_tokens": 3}
# Rows leave where the policy sends them: some early, some late.
DYNAMIC = {"method": "del", "del_exit_layers": [1, 3], "num_speculative_tokens": 3, "del_objective": "tpl"}
# Of drafts up to four rows; of verifications, all.
SIZES = [1, 4, 16]
ENGINE = {"attention_backend": "TRITON_ATTN"}

pytestmark = [pytest.mark.engine, pytest.mark.parametrize("host", ["v2"], indirect=True)]


@pytest.mark.parametrize(
    # Gemma's early layers are in two KV cache groups.
    ("architecture", "spec"),
    [("llama", FIXED), ("llama", DYNAMIC), ("gemma2", FIXED)],
    ids=["fixed", "dynamic", "gemma2"],
)
def test_the_same_text_and_drafts(host: Host, checkpoints: Path, architecture: str, spec: dict[str, Any]) -> None:
    model = checkpoint(checkpoints, architecture)
    eager = host.generate(model, PROMPTS, GREEDY, spec, **ENGINE)
    with _recorded(host, model, spec) as stages:
        assert stages == dict.fromkeys(SIZES[:2], 2 if spec is FIXED else 3)
        replayed = host.generate(model, PROMPTS, GREEDY, spec, **ENGINE)
        replays = host.call(_replays, model, spec)
    assert replayed.completions == eager.completions
    assert replayed.accepted > 0
    if spec is FIXED:  # the other one has learnt something in between
        assert (replayed.drafted, replayed.accepted) == (eager.drafted, eager.accepted)
    # Three rows are padded to four.
    assert replays[4, 0] > 0
    assert replays[4, 0] == replays[4, stages[4] - 1], "every step ends with the head"
    # Each as it was recorded: for rows of the last token and three drafts, however few there are.
    assert host.call(_bounds, model, spec) == {4}
    # Verifications too, of whatever lengths: more of them than there are rounds in which all draft the most.
    assert sum(replays[size, None] for size in SIZES) >= replayed.steps - 3


def test_attention_that_replays_even_rows_alone(host: Host, checkpoints: Path) -> None:
    """One sequence has a graph in every round, whatever it drafts; several have one where they draft nothing."""
    model = checkpoint(checkpoints, "llama")
    at_most = [GREEDY | {"extra_args": {"del": {"max_draft": most}}} for most in (0, 1)]
    runs = [(PROMPTS[:1], at_most[1]), (PROMPTS[:1], GREEDY), (PROMPTS[:2], at_most[0]), (PROMPTS, GREEDY)]
    expected = [host.generate(model, *run, FIXED, **ENGINE) for run in runs]
    with _recorded(host, model, FIXED, even=True):
        replays = []
        for run, before in zip(runs, expected, strict=True):
            host.call(_forget_replays, model, FIXED)
            assert host.generate(model, *run, FIXED, **ENGINE) == before
            replays.append({size: n for (size, of), n in host.call(_replays, model, FIXED).items() if of is None})
    short, alone, undrafted, together = replays
    # Every round with drafts: of a token and one draft, and of a token and three.
    assert short[2] == expected[0].rounds > 0
    assert alone[4] == expected[1].rounds > 0
    # Two tokens are padded to four. The first one is of the prompt's step.
    assert undrafted == {4: GREEDY["max_tokens"] - 1}
    assert together[16] > 0
    assert expected[3].accepted > 0


@pytest.mark.parametrize("even", [False, True])
def test_costs_are_those_of_graphs(host: Host, checkpoints: Path, even: bool) -> None:
    """What is measured at start is what serves, and leaves nothing behind."""
    model = checkpoint(checkpoints, "llama")
    expected = host.generate(model, PROMPTS, GREEDY, FIXED, **ENGINE)
    with _recorded(host, model, FIXED, even):
        replays = host.call(_rehearse, model, FIXED, even)
        again = host.generate(model, PROMPTS, GREEDY, FIXED, **ENGINE)
    # Twice three steps of two rows; five tokens, of rows of any length padded to sixteen; two, padded to four.
    assert replays == {(4, 0): 6, (4, 1): 6, (4, None): 1} | ({} if even else {(16, None): 1})
    assert again == expected


def test_metadata_is_updated_in_place_or_built(host: Host, checkpoints: Path) -> None:
    """Attention backends that cannot update a draft's metadata in place have it built at each step."""
    model = checkpoint(checkpoints, "llama")
    expected = host.generate(model, PROMPTS, GREEDY, FIXED, **ENGINE)
    with _recorded(host, model, FIXED):
        built = [host.call(_count_builds, model, FIXED, updates) for updates in (True, False)]
    assert [outcome["completions"] for outcome in built] == [expected.completions] * 2
    # Before every step the one or the other, for all of its rows.
    rounds, steps = built
    assert 0 < rounds["builds"] < steps["builds"] == rounds["builds"] + rounds["updates"]
    assert steps["updates"] == 0


@contextmanager
def _recorded(host: Host, model: str, spec: dict[str, Any], even: bool = False) -> Iterator[dict[int, int]]:
    """Inside, the engine drafts by graph: stages by size of batch. `even`: with attention for rows of one length."""
    stages = host.call(_record, model, spec, even)
    try:
        yield stages
    finally:
        host.call(_forget, model, spec)


def _runner(model: str, spec: dict[str, Any]) -> Any:
    engine = engines._engine(model, spec, ENGINE)
    return engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def _record(model: str, spec: dict[str, Any], even: bool) -> dict[int, int]:
    """In the engine's process: the stages recorded for each size of batch."""
    import torch
    from vllm.config.compilation import CUDAGraphMode
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    runner = _runner(model, spec)
    replays = runner.replays = Counter()

    prepare_attn, bounds = runner.model_state.prepare_attn, set()
    runner.bounds = bounds

    def noted(batch: Any, mode: CUDAGraphMode, *args: Any, **kwargs: Any) -> Any:
        if mode == CUDAGraphMode.FULL:
            bounds.add(batch.max_query_len or int(batch.num_scheduled_tokens.max()))
        return prepare_attn(batch, mode, *args, **kwargs)

    runner.model_state.prepare_attn = noted

    class Graph:
        def __init__(self, desc: Any, prepare: Any) -> None:
            self.key = desc.num_tokens, getattr(desc, "index", None)
            prepare(desc, warmup=True)(CUDAGraphMode.NONE)
            self.run = prepare(desc, warmup=False)
            self.run(CUDAGraphMode.NONE)

        def replay(self) -> None:
            replays[self.key] += 1
            self.run(CUDAGraphMode.NONE)

    def capture(self: Any, prepare: Any, _description: str) -> None:
        for descs in self._capture_descs.values():
            self.graphs.update({desc: Graph(desc, prepare) for desc in descs})
        self._graphs_captured = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.compilation_config, "cudagraph_capture_sizes", SIZES)
        patch.setattr(runner.compilation_config, "max_cudagraph_capture_size", max(SIZES))
        patch.setattr(type(current_platform), "get_global_graph_pool", lambda self: None)
        patch.setattr(torch.accelerator, "get_memory_info", lambda: (0, 0))
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)
        patch.setattr(CudaGraphManager, "capture", capture)
        if even:
            unsupported = "vllm_del.engine.verification.get_varlen_cudagraph_unsupported_backend"
            patch.setattr(unsupported, lambda *_: ("EVEN_ROWS", None))
        runner.speculator.init_cudagraph_manager(CUDAGraphMode.FULL_DECODE_ONLY)
        runner.capture_model(profile_only=True)
    return dict(Counter(desc.num_tokens for desc in runner.speculator.graphs.graphs))


def _forget(model: str, spec: dict[str, Any]) -> None:
    from vllm.config.compilation import CUDAGraphMode

    runner = _runner(model, spec)
    runner.speculator.init_cudagraph_manager(CUDAGraphMode.NONE)
    runner.cudagraph_manager.release_graphs()
    del runner.model_state.prepare_attn


def _rehearse(model: str, spec: dict[str, Any], even: bool) -> dict[tuple[int, int | None], int]:
    """In the engine's process: what was replayed."""
    from vllm_del.engine.rehearsal import Rehearsal

    runner = _runner(model, spec)
    rehearsal = Rehearsal(runner.speculator)
    assert rehearsal.even == even
    rehearsal.at_once = 2  # as on a GPU, where it is a few
    rehearsal.drafting(2, 1, 20)()
    rehearsal.verify(5, 4, 20)
    rehearsal.verify(2, 1, 20)
    return dict(runner.replays)


def _bounds(model: str, spec: dict[str, Any]) -> set[int]:
    return _runner(model, spec).bounds


def _replays(model: str, spec: dict[str, Any]) -> Counter:
    return _runner(model, spec).replays


def _forget_replays(model: str, spec: dict[str, Any]) -> None:
    _runner(model, spec).replays.clear()


def _count_builds(model: str, spec: dict[str, Any], updates: bool) -> dict[str, Any]:
    """In the engine's process: a generation, and how often it built a draft's metadata."""
    speculator = _runner(model, spec).speculator
    builds = []
    build = speculator._build_attn_metadata

    def counted(*args: Any, **kwargs: Any) -> Any:
        builds.append(kwargs["step"])
        return build(*args, **kwargs)

    updated = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculator, "_update_draft_decode_metadata", lambda *given: updated.append(given))
        patch.setattr(speculator, "supports_decode_metadata_update", updates)
        patch.setattr(speculator, "_build_attn_metadata", counted)
        outcome = engines._serve(model, tuple(Arrival(prompt, GREEDY) for prompt in PROMPTS), spec, ENGINE)
    return {"completions": outcome.completions, "builds": len(builds), "updates": len(updated)}
