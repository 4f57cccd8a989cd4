"""A batch over Ray: completions are those without drafts, drafts were accepted, a bad line is an error of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DEMO_MODEL
from tests.engine.host import Host

SCRIPT = DEMO_MODEL.parent / "ray_batch.py"
PROMPTS = ["def main", "import os\n", "class A", "for i in"]
SAMPLING = {"temperature": 0, "max_tokens": 24}
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "kv_cache_memory_bytes": 1 << 26}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # No cluster but one of this test's own, and nothing of it in the user's folder.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_ADDRESS": "local",
        "COLUMNS": "400",
    }
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.engine
@pytest.mark.parametrize("host", ["v1"], indirect=True)
def test_completions_are_those_without_drafts(host: Host, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"prompt": prompt, "number": number} for number, prompt in enumerate(PROMPTS)]
    # What Python takes for the end of a line, JSON does not.
    lines[0]["note"] = "one\u2028two"
    # Fields of its own, none, and no JSON.
    bad = [{"prompt": None, "number": "of another type"}, {}, {"line": "{"}]
    text = [*(json.dumps(line, ensure_ascii=False) for line in [*lines, *bad[:2]]), "{"]
    (tmp_path / "prompts.jsonl").write_text("".join(line + "\n" for line in text))
    # As the paper has it drafts do not depend on what this machine is doing meanwhile.
    spec = {"method": "del", "del_objective": "tpl"}
    options = {"spec": spec, "engine-args": ENGINE, "sampling": SAMPLING}
    arguments = [part for name, value in options.items() for part in (f"--{name}", json.dumps(value))]
    done = run(str(DEMO_MODEL), str(tmp_path / "prompts.jsonl"), str(tmp_path / "out"), *arguments)

    said = done.stdout + done.stderr
    assert f"{len(text)} prompts, {24 * len(PROMPTS)} tokens" in done.stdout, said[-4000:]
    assert "3 failed" in done.stdout
    assert done.returncode == 1
    written = [json.loads(line) for file in (tmp_path / "out").iterdir() for line in file.read_text().splitlines()]
    off = host.generate(str(DEMO_MODEL), PROMPTS, SAMPLING)
    expected = [
        line | {"completion": completion.text, "tokens": 24, "error": ""}
        for line, (completion,) in zip(lines, off.completions, strict=True)
    ]
    expected += [line | {"completion": "", "tokens": 0, "error": "there is no text in `prompt`"} for line in bad]
    assert sorted(written, key=repr) == sorted(expected, key=repr)
    accepted = re.search(r"del: .* (\d+)% accepted", said)
    assert accepted is not None
    assert int(accepted[1]) > 0


def test_what_is_there_already_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("")
    refused = run("MODEL", str(tmp_path / "prompts.jsonl"), str(tmp_path))
    assert refused.returncode == 2
    assert "is there already" in refused.stderr
