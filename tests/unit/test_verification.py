"""Which graphs verifications have; and by whose clock a made-up one is timed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode

from vllm_del.engine import verification
from vllm_del.engine.verification import EvenGraphs, record_decodes, run_made_up

SIZES, LONGEST, ROWS = [1, 2, 4, 8, 16, 24], 4, 8


@pytest.mark.parametrize("mode", [CUDAGraphMode.FULL_DECODE_ONLY, CUDAGraphMode.FULL_AND_PIECEWISE])
def test_graphs_for_rows_of_one_length(graph_config: Callable[..., Any], mode: CUDAGraphMode) -> None:
    graphs = EvenGraphs(graph_config(SIZES, ROWS), torch.device("cpu"), mode, LONGEST)
    graphs._graphs_captured = True

    def found(rows: int, tokens: int) -> Any:
        even = tokens // rows if tokens % rows == 0 else None
        return graphs.dispatch(rows, tokens, even, 0, max_query_len=-(-tokens // rows))

    recorded = {desc for descs in graphs._capture_descs.values() for desc in descs}
    for rows in range(1, ROWS + 1):
        for length in range(1, LONGEST + 1):
            desc = found(rows, rows * length)
            # Without drafts, with the most, and alone; the largest size that vLLM records is of 24 tokens.
            whole = (length in (1, LONGEST) and rows * length <= 24) or rows == 1
            assert (desc.cg_mode == CUDAGraphMode.FULL) == whole, (rows, length)
            if whole:
                assert desc in recorded
                assert desc.uniform_token_count == length
                assert desc.num_reqs >= rows
                assert desc.num_tokens == desc.num_reqs * length
    # Of different lengths: as vLLM runs prompts, which are in no graph for decodes.
    assert found(2, 3).cg_mode == (mode.mixed_mode() or CUDAGraphMode.NONE)
    for recorded_mode, descs in graphs._capture_descs.items():
        assert len({*descs}) == len(descs), "vLLM records none twice"
        # The largest first, whose memory the others then use.
        assert descs == sorted(descs, key=lambda desc: -desc.num_tokens)
        assert all(desc.cg_mode == recorded_mode for desc in descs)
    assert graphs.decode_query_len == LONGEST


@pytest.mark.parametrize("unsupported", [None, ("FLASH_ATTN", None)])
def test_what_attention_can_do_decides(monkeypatch: pytest.MonkeyPatch, unsupported: tuple | None) -> None:
    asked: list[dict[str, Any]] = []
    for name in ("ModelCudaGraphManager", "EvenGraphs"):
        monkeypatch.setattr(verification, name, lambda *_, name=name, **given: asked.append(given) or name)
    monkeypatch.setattr(verification, "get_varlen_cudagraph_unsupported_backend", lambda *_: unsupported)
    names = ["attn_groups", "vllm_config", "device", "decode_query_len", "lora_capture_cases", "ubatch_runner"]
    runner = SimpleNamespace(**dict.fromkeys(names), cudagraph_manager="vLLM's")
    for mode in (CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL):
        record_decodes(runner, mode)
    assert runner.cudagraph_manager == "vLLM's", "no graphs of decodes alone"
    record_decodes(runner, CUDAGraphMode.FULL_AND_PIECEWISE)
    assert runner.cudagraph_manager == ("EvenGraphs" if unsupported else "ModelCudaGraphManager")
    assert [given["varlen_decode"] for given in asked] == [not unsupported]


class Clock:
    """Goes as `StepTimingCollector` does: what a step took is known when it has ended."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    @contextmanager
    def collect(self) -> Iterator[list[Any]]:
        timings: list[Any] = []
        yield timings
        self.seen.append("collected")
        timings.append(SimpleNamespace(forward_ms=7.0))

    def __getattr__(self, name: str) -> Any:
        return lambda: self.seen.append(name)


@pytest.mark.parametrize(("device", "seconds"), [("cuda", 0.007), ("cpu", None)])
def test_who_tells_the_time(monkeypatch: pytest.MonkeyPatch, device: str, seconds: float | None) -> None:
    runner = SimpleNamespace(step_timing=Clock(), device=torch.device(device))
    seen = runner.step_timing.seen
    monkeypatch.setattr(verification, "_hidden_states", lambda *_: seen.append("forward") or torch.zeros(3, 2))
    logits = lambda states: seen.append("logits") or states  # noqa: E731
    assert run_made_up(runner, logits, [2, 1], 40) == seconds
    assert seen[:5] == ["forward", "logits", "forward_end", "drafter_start", "drafter_end"]
    assert seen[5:] == ["collected"] * (device == "cuda")
