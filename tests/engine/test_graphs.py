"""Draft steps by graph, without a GPU: what would be recorded is kept as a function of what lay in memory then.

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
SIZES = [1, 4]
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
        assert stages == dict.fromkeys(SIZES, 2 if spec is FIXED else 3)
        replayed = host.generate(model, PROMPTS, GREEDY, spec, **ENGINE)
        replays = host.call(_replays, model, spec)
    assert replayed.completions == eager.completions
    assert replayed.accepted > 0
    if spec is FIXED:  # the other one has learnt something in between
        assert (replayed.drafted, replayed.accepted) == (eager.drafted, eager.accepted)
    # Three rows are padded to four.
    assert replays[4, 0] > 0
    assert replays[4, 0] == replays[4, stages[4] - 1], "every step ends with the head"


def test_metadata_is_updated_in_place_or_built(host: Host, checkpoints: Path) -> None:
    """Attention backends that cannot update a draft's metadata in place have it built at each step."""
    model = checkpoint(checkpoints, "llama")
    expected = host.generate(model, PROMPTS, GREEDY, FIXED, **ENGINE)
    with _recorded(host, model, FIXED):
        built = [host.call(_count_builds, model, FIXED, updates) for updates in (True, False)]
    assert [outcome["completions"] for outcome in built] == [expected.completions] * 2
    rounds, steps = (outcome["builds"] for outcome in built)
    assert 0 < rounds < steps


@contextmanager
def _recorded(host: Host, model: str, spec: dict[str, Any]) -> Iterator[dict[int, int]]:
    """Inside, the engine drafts by graph: stages by size of batch."""
    stages = host.call(_record, model, spec)
    try:
        yield stages
    finally:
        host.call(_forget, model, spec)


def _speculator(model: str, spec: dict[str, Any]) -> Any:
    engine = engines._engine(model, spec, ENGINE)
    return engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.speculator


def _record(model: str, spec: dict[str, Any]) -> dict[int, int]:
    """In the engine's process: the stages recorded for each size of batch."""
    import torch
    from vllm.config.compilation import CUDAGraphMode
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    speculator = _speculator(model, spec)
    compilation = speculator.vllm_config.compilation_config
    replays: Counter = Counter()

    class Graph:
        def __init__(self, desc: Any, prepare: Any) -> None:
            self.desc = desc
            prepare(desc, warmup=True)(CUDAGraphMode.NONE)
            self.run = prepare(desc, warmup=False)
            self.run(CUDAGraphMode.NONE)

        def replay(self) -> None:
            replays[self.desc.num_tokens, self.desc.index] += 1
            self.run(CUDAGraphMode.NONE)

    def capture(self: Any, prepare: Any, _description: str) -> None:
        for descs in self._capture_descs.values():
            self.graphs.update({desc: Graph(desc, prepare) for desc in descs})
        self._graphs_captured = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, "cudagraph_capture_sizes", SIZES)
        patch.setattr(compilation, "max_cudagraph_capture_size", max(SIZES))
        patch.setattr(type(current_platform), "get_global_graph_pool", lambda self: None)
        patch.setattr(torch.accelerator, "get_memory_info", lambda: (0, 0))
        patch.setattr(CudaGraphManager, "capture", capture)
        speculator.init_cudagraph_manager(CUDAGraphMode.FULL_AND_PIECEWISE)
        speculator.capture()
    speculator.replays = replays
    return dict(Counter(desc.num_tokens for desc in speculator.graphs.graphs))


def _forget(model: str, spec: dict[str, Any]) -> None:
    from vllm.config.compilation import CUDAGraphMode

    _speculator(model, spec).init_cudagraph_manager(CUDAGraphMode.NONE)


def _replays(model: str, spec: dict[str, Any]) -> Counter:
    return _speculator(model, spec).replays


def _count_builds(model: str, spec: dict[str, Any], updates: bool) -> dict[str, Any]:
    """In the engine's process: a generation, and how often it built a draft's metadata."""
    speculator = _speculator(model, spec)
    builds = []
    build = speculator._build_attn_metadata

    def counted(*args: Any, **kwargs: Any) -> Any:
        builds.append(kwargs["step"])
        return build(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculator, "supports_decode_metadata_update", updates)
        patch.setattr(speculator, "_build_attn_metadata", counted)
        outcome = engines._serve(model, tuple(Arrival(prompt, GREEDY) for prompt in PROMPTS), spec, ENGINE)
    return {"completions": outcome.completions, "builds": len(builds)}
