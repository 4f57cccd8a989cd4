"""The GPU check where there is no GPU: its parts run on what there is, and what was not measured is not claimed."""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tests.engine.checkpoints import checkpoint

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)


@pytest.mark.engine
def test_parts_run_on_a_small_model(tmp_path: Path) -> None:
    # In the place of a synthetic model, which takes longer to make than all the rest.
    model = Path(checkpoint(tmp_path, "llama", num_hidden_layers=8, max_position_embeddings=1024))
    (model / "synthetic.json").write_text("{}")
    model.rename(tmp_path / "tiny-exit-2")
    out = tmp_path / "check.json"
    options = "--parts model,lossless,waits,del --shape tiny --exit 2 --batches 1 --texts 1 --tokens 16 --eager"
    options += f" --out {out} --folder {tmp_path}"
    command = [sys.executable, str(SCRIPTS / "gpu_check.py"), *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr + (out.read_text() if out.exists() else "")
    found = json.loads(out.read_text())
    assert found["lossless"]["float32_drafted"] > 0
    assert found["lossless"]["float32_apart"] == []
    assert found["waits"]["waits"] is None, "there is no device to wait for"
    assert found["del"]["tokens_per_second"].keys() == {"0.9 x1", "0.8 x1"}
    assert found["del"]["draft_step_over_bytes"].keys() == {"1", "2", "4", "8", "16"}
    assert 0 < found["del"]["planning_over_verification"] < 10
    assert "not measured" in done.stdout, "nothing was run without drafts, so there is no speed-up"


def test_what_was_not_measured_is_said_to_be(scripts: None) -> None:
    from gpu_check import compared

    rows = {what: rest for what, *rest in compared({})}
    assert rows["8B, agreement 0.9 x1: speed-up"] == ["not measured", ""]
    assert rows["kernels"] == ["not run", ""]
    failed = {"off": {"ended": "failed with 1"}, "del": {"tokens_per_second": {"0.8 x1": 9.0}, "nothing_drafted": 9.0}}
    rows = {what: rest for what, *rest in compared(failed)}
    assert rows["nothing drafted: speed-up"] == ["not measured", ""]


def test_figures_are_held_against_what_is_asked_for(scripts: None) -> None:
    from gpu_check import compared

    found: dict[str, Any] = {
        "lossless": {"float32_apart": [1e-5]},
        "waits": {"waits": []},
        "off": {"tokens_per_second": {"0.9 x1": 100.0, "0.8 x1": 100.0, "0.8 x8": 500.0}, "kv_cache_bytes": 1000},
        "del": {
            "tokens_per_second": {"0.9 x1": 210.0, "0.8 x1": 140.0, "0.8 x8": 480.0},
            "nothing_drafted": 99.5,
            "draft_step_over_bytes": {"1": 1.1, "16": 1.3},
            "planning_over_verification": 0.009,
            "kv_cache_bytes": 990,
            "model_bytes": 1000,
        },
    }
    reached = {what: verdict.split(",")[0] for what, _, verdict in compared(found) if verdict}
    assert reached == {
        "lossless in float32: texts apart, at near-ties": "NO",
        "waits for the device while drafting: places": "yes",
        "planning for 256 rows, of a verification": "yes",
        "draft step, 1 rows: time over bytes / bandwidth": "yes",
        "draft step, 16 rows: time over bytes / bandwidth": "NO",
        "8B, agreement 0.9 x1: speed-up": "yes",
        "8B, agreement 0.8 x1: speed-up": "NO",
        "8B, agreement 0.8: least speed-up of all batches": "NO",
        "nothing drafted: speed-up": "yes",
        "memory beyond off, of the model": "yes",
    }


def test_a_part_that_takes_too_long_is_stopped_with_all_that_it_started(scripts: None, monkeypatch, tmp_path) -> None:
    import gpu_check

    child = tmp_path / "child"
    monkeypatch.setitem(gpu_check.PARTS, "kernels", ["bash", "-c", f"sleep 600 & echo $! > {child}; wait"])
    found = gpu_check.run("kernels", {}, 5.0)
    assert found["ended"] == "stopped after 5 s"
    with suppress(psutil.NoSuchProcess):
        orphan = psutil.Process(int(child.read_text()))
        assert psutil.wait_procs([orphan], timeout=10)[0] or orphan.status() == psutil.STATUS_ZOMBIE


def test_near_ties(scripts: None) -> None:
    from gpu_parts import near_tie

    def text(*tokens: int) -> SimpleNamespace:
        known = {1: SimpleNamespace(logprob=-0.6), 2: SimpleNamespace(logprob=-0.65), 3: SimpleNamespace(logprob=-3.0)}
        return SimpleNamespace(token_ids=list(tokens), logprobs=[known] * len(tokens))

    assert near_tie(text(1, 1), text(1, 2), "bfloat16") == pytest.approx(0.05)
    assert near_tie(text(1, 1), text(1, 2), "float32") is None
    assert near_tie(text(1, 1), text(1, 3), "bfloat16") is None
    assert near_tie(text(1, 1), text(1, 9), "bfloat16") is None


def test_no_part_takes_the_time_of_those_before_it(scripts: None) -> None:
    import gpu_check

    # What is asked for, and then what there is time for
    assert list(gpu_check.LONGEST) == list(gpu_check.PARTS)[: len(gpu_check.LONGEST)]
    assert sum(gpu_check.LONGEST.values()) < 570


def test_waits_are_told_by_place(scripts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM says them where its check is on: torch's warning, which comes from within that check, and its own."""
    import warnings

    from gpu_parts import watched_waits
    from vllm.utils import gpu_sync_debug

    def module(name: str, does: Callable[[], None]) -> Callable[[], None]:
        """Calls it from a module of that name, in its second line."""
        scope = {"__name__": name, "does": does}
        exec("def call():\n  does()", scope)
        return scope["call"]

    monkeypatch.setattr(gpu_sync_debug, "_sync_filter_head", None)
    monkeypatch.setattr(gpu_sync_debug, "_prev_showwarning", warnings.showwarning)
    texts = iter((gpu_sync_debug._TORCH_SYNC_WARNING, gpu_sync_debug.IMPLICIT_SYNC_ERROR_MESSAGE, "another matter"))
    warn = module("vllm.utils.gpu_sync_debug", lambda: warnings.warn(next(texts), UserWarning, stacklevel=1))
    with warnings.catch_warnings():
        waits = watched_waits()
        gpu_sync_debug._install_warning_hook()
        checking = gpu_sync_debug._checking.set("warn")
        try:
            for name in ("vllm_del.kernels.exit_rows", "vllm.v1.worker", "vllm_del.draft.loop"):
                module(name, module("torch.functional", warn))()
        finally:
            gpu_sync_debug._checking.reset(checking)
    assert waits == {"vllm_del.kernels.exit_rows:2", "vllm.v1.worker:2"}
