"""`vllm-del profile`: what it finds of the demo model, and what it says of any."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.conftest import DEMO_MODEL
from vllm_del import cli
from vllm_del.policy.cost import Correction, MeasuredCosts
from vllm_del.policy.predict import ExitProfile, Profile

# Beside other tests there is less memory than vLLM asks for on a CPU.
ENGINE = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "kv_cache_memory_bytes": 1 << 26}

COSTS = MeasuredCosts(0.0, (1, 64), (1e-3, 2e-3), (1, 512), (1e-3, 2e-3), (1, 448), (16e-3, 32e-3))


def profile_of(agreement: float) -> Profile:
    return Profile("org/model", 16, 6, 900, 200, [ExitProfile(4, 900, agreement, 0.8, 0.4)], COSTS)


@pytest.mark.engine
def test_the_demo_model(tmp_path: Path) -> None:
    """Every exit is asked at every token, and its agreement is as its card says, more or less: other text, greedy."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("import os\\n\\n\\ndef walk(top):\\n\n\nclass Stack:\\n    def __init__(self):\\n\n")
    command = [str(Path(sys.executable).with_name("vllm-del")), "profile", str(DEMO_MODEL), "--json", "--batch", "4"]
    command += ["--prompts", str(prompts), "--max-tokens", "48", "--exits", "2,4,6", "--plot", str(tmp_path / "p.png")]
    command += ["--engine-args", json.dumps(ENGINE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert [exit["depth"] for exit in found["exits"]] == [2, 4, 6]
    assert all(96 <= exit["asked"] <= 96 + 2 * 32 for exit in found["exits"])
    assert all(0.3 < exit["agreement"] <= 1 for exit in found["exits"])
    assert found["exits"][0]["agreement"] < found["exits"][2]["agreement"]
    assert found["exits"][1]["confidence_right"] > found["exits"][1]["confidence_wrong"]
    assert [prediction["batch"] for prediction in found["predictions"]] == [1, 4]
    assert found["costs"]["verify"][0] > found["costs"]["layer"][0] > 0
    assert found["correction"] != asdict(Correction()), "the clock has said nothing"
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.engine
def test_a_draft_vocabulary_costs_agreement(tmp_path: Path) -> None:
    """What it costs stands beside what there was: a few tokens are not all that this text is made of."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("import os\\n\\n\\ndef walk(top):\\n\n")
    options = ["--json", "--batch", "1", "--prompts", str(prompts), "--max-tokens", "48", "--exits", "4,6"]
    options += ["--draft-vocab", "300", "--max-draft", "2"]
    options += ["--engine-args", json.dumps(ENGINE)]
    command = [str(Path(sys.executable).with_name("vllm-del")), "profile", str(DEMO_MODEL), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["head"] == {"del_draft_vocab": 300}
    assert all(exit["agreement"] < exit["whole_head"] - 0.05 for exit in found["exits"])


def test_predictions_go_by_the_clock() -> None:
    corrected = replace(profile_of(0.95), correction=Correction(draft=6.0, verify=2.0, overhead=1e-3, step=5e-4))
    by_tables, by_clock = profile_of(0.95).predictions([1])[0], corrected.predictions([1])[0]
    assert 1 / by_clock.without == pytest.approx(1e-3 + 2 / by_tables.without)
    assert by_clock.length < by_tables.length


def test_an_exit_that_was_never_wrong_is_json_too() -> None:
    exit = ExitProfile(4, 900, 1.0, 0.8, float("nan"))
    found = cli.as_dict(replace(profile_of(1.0), exits=[exit]), [], None)
    assert json.loads(json.dumps(found, allow_nan=False))["exits"][0]["confidence_wrong"] is None


def test_what_it_advises(capsys: pytest.CaptureFixture[str]) -> None:
    good = profile_of(0.95)
    configuration = good.configuration([1, 4])
    assert configuration is not None
    assert configuration["del_exit_layers"] == [4]
    cli.show(good, good.predictions([1, 4]), configuration)
    assert json.dumps(configuration) in capsys.readouterr().out


def test_the_head_it_was_asked_with_is_part_of_the_advice(capsys: pytest.CaptureFixture[str]) -> None:
    head: dict[str, str | int] = {"del_draft_vocab": 8000, "del_draft_head": "fp8"}
    asked = profile_of(0.95)
    asked = replace(asked, head=head, exits=[replace(asked.exits[0], whole_head=0.987)])
    configuration = asked.configuration([1, 4])
    assert configuration is not None
    assert head.items() <= configuration.items()
    cli.show(asked, asked.predictions([1, 4]), configuration)
    assert "0.987" in capsys.readouterr().out


def test_it_says_plainly_when_del_will_not_pay(capsys: pytest.CaptureFixture[str]) -> None:
    bad = profile_of(0.05)
    assert bad.configuration([1, 4]) is None
    cli.show(bad, bad.predictions([1, 4]), None)
    out = capsys.readouterr().out
    assert "del will not pay for this model here" in out
    assert "no drafts" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--exits", "2,x"], "--exits '2,x'"),
        (["--prompts", "/nowhere"], "--prompts /nowhere"),
        (["--engine-args", "[1]"], "--engine-args '[1]'"),
        (["--engine-args", "{"], "--engine-args '{'"),
        (["--plot", "/nowhere/p.png"], "--plot /nowhere/p.png"),
    ],
)
def test_options_that_are_not_understood(arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(cli.app, ["profile", "org/model", *arguments])
    assert done.exit_code == 2
    assert words in " ".join(done.output.replace("│", " ").split())
