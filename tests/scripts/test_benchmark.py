"""The benchmark on a small synthetic model: what is committed of it was made by a script that runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from expected import ENOUGH, allowed, estimates

from vllm_del.draft.tally import Counts
from vllm_del.policy.cost import Correction, MeasuredCosts

SCRIPTS = Path(__file__).parents[2] / "scripts"

# One row costs what a layer and the head take; a verification a second, and a prompt of 32 tokens another one.
COSTS = MeasuredCosts(0.0, (1, 64), (0.01, 0.01), (1, 64), (0.02, 0.02), (1, 33), (1.0, 2.0))


def run(script: str, *arguments: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]


def counts(tried: float, accepted: float, expected: float = 0.0, seconds: tuple[float, float] = (0.0, 0.0)) -> Counts:
    return Counts([tried], [accepted], [tried], [expected], [0.0, tried], *seconds)


@pytest.mark.parametrize(
    ("correction", "seen", "per_second"),
    [
        # All are accepted: nine tokens for eight drafts of 0.05 seconds and a verification of 1.25.
        (Correction(), counts(ENOUGH, ENOUGH), 9 / 1.65),
        # Too few to tell: as the model was made, of which none is.
        (Correction(), counts(ENOUGH - 1, ENOUGH - 1), 1.0),
        (Correction(draft=3.0, verify=2.0), counts(ENOUGH, ENOUGH), 9 / (1.2 + 2.5)),
    ],
)
def test_what_is_allowed(correction: Correction, seen: Counts, per_second: float) -> None:
    about = {"agreement_by_exit": {"easy": {"3": 0.0}}}
    found = allowed(COSTS, correction, [seen], "easy x1", about, [3], 8, 90)
    prompt, without = correction.verify, 90 * correction.verify
    assert found["allowed"] == pytest.approx((prompt + without) / (prompt + 90 / per_second), abs=2e-3)
    assert found["off_by_costs"] == pytest.approx(90 / (prompt + without), abs=0.05)
    assert found["allowed_at"] == {3: float(sum(seen.tried) >= ENOUGH)}
    assert allowed(COSTS, correction, [seen], "mixed x1", about, [3], 8, 90) == {"allowed": None}


def test_what_was_expected() -> None:
    found = estimates([counts(10, 8, 7.5, (1.0, 2.0)), counts(30, 27, 28.5, (3.0, 3.0)), counts(0, 0)])
    assert found["drafted_by_exit"] == [40]
    assert (found["acceptance"], found["acceptance_expected"]) == (0.875, 0.9)
    assert found["round_time_planned_over_measured"] == 0.75
    assert estimates([counts(0, 0)]) == {"drafted_by_exit": [0]}


@pytest.mark.engine
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
    # How much the dynamic policy drafts goes by the clock of a busy machine; those of the fixed pair do not.
    assert easy["dynamic"]["accepted_of_drafted"] > 0.3
    assert easy["fixed 4:2"]["accepted_of_drafted"] > 0.4 > mixed["fixed 4:2"]["accepted_of_drafted"]
    best = max(easy[name]["speed_up"] for name in easy if name.startswith("fixed"))
    assert easy["dynamic_over_best_fixed"] == pytest.approx(easy["dynamic"]["speed_up"] / best, abs=0.01)
    assert easy["allowed_at"].keys() == {"2", "4"}
    assert easy["allowed"] is not None
    assert mixed["allowed"] is None
