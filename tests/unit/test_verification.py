"""A made-up verification is timed by the device's clock where that is not the host's."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_del.engine import verification
from vllm_del.engine.verification import run_made_up


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
