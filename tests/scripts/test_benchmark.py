"""The benchmark on a small synthetic model: what is committed of it was made by a script that runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"

pytestmark = pytest.mark.engine


def run(script: str, *arguments: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]


def test_synthetic_model_and_benchmark(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "results" / "out.json"
    run("synthetic.py", "--shape", "tiny", "--out", str(model), "--easy", "0.9", "--exit", "2")
    agreement = json.loads((model / "synthetic.json").read_text())["agreement_by_exit"]
    assert agreement["easy"]["2"] == pytest.approx(0.9, abs=0.06)
    assert agreement["hard"]["2"] < 0.3

    options = "--exits 2,4 --longest 2 --fixed 2,4:2 --heats 1 --repeats 1 --dtype float32"
    options += " --tokens 64 --heat-tokens 8"
    workloads = "easy x1,mixed x4"
    run("benchmark.py", str(model), *options.split(), "--eager", "--workloads", workloads, "--out", str(out))
    results = json.loads(out.read_text())
    assert set(results["workloads"]) == {"easy x1", "mixed x4"}
    easy, mixed = results["workloads"].values()
    assert easy["off"]["speed_up"] == 1
    for found, requests in (easy, 2), (mixed, 8):
        same = f"{requests} of {requests}"
        assert len(found["heats"]) == 3
        finalists = [name for name in found if name.startswith("fixed")]
        # The best of exit 2, and the only one of exit 4.
        of_exit_2 = {name: rate for name, rate in found["heats"].items() if name.startswith("fixed 2")}
        assert finalists == [max(of_exit_2, key=of_exit_2.get), "fixed 4:2"]
        assert all(found[name]["same_output"] == same for name in ("off again", "dynamic", *finalists))
        assert found["dynamic_over_best_fixed"] > 0
    # How much the dynamic policy drafts goes by the clock of a busy machine; those of the fixed pair do not.
    assert easy["dynamic"]["accepted_of_drafted"] > 0.3
    assert easy["fixed 4:2"]["accepted_of_drafted"] > 0.4 > mixed["fixed 4:2"]["accepted_of_drafted"]
    assert easy["allowed"] > 0
    assert easy["allowed_at"].keys() == {"2", "4"}
    assert mixed["allowed"] is None
