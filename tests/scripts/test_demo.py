"""scripts/demo.py: once for real, and stopped from outside, while its first server starts and its second."""

import os
import re
import signal
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "demo.py"

# A server that never gets healthy, with shared memory, and with a child that only SIGKILL ends and that keeps Python's
# resource tracker waiting. Tells the numbers of these processes, the tracker's last, and the name of the memory.
STUB = f"""\
#!{sys.executable}
import os
from multiprocessing import resource_tracker, shared_memory
from subprocess import PIPE, Popen

memory = shared_memory.SharedMemory(create=True, size=1)
tracker = resource_tracker._resource_tracker
deaf = 'trap "" TERM INT HUP; echo; while :; do read -t 100 <>"$PIDS.never"; done'
child = Popen(["bash", "-c", deaf], stdout=PIPE, pass_fds=[tracker._fd])
child.stdout.readline()
with open(os.environ["PIDS"], "w") as pids:
    print(os.getpid(), child.pid, tracker._pid, memory.name, file=pids)
child.wait()
"""


# Not compiled, which takes minutes: tests/server does that. And so nothing may need a compiler.
DEMO = [sys.executable, str(SCRIPT), "--max-tokens", "24"]
WITHOUT_COMPILER = os.environ | {"CXX": "no-such-compiler"}


@pytest.mark.server
def test_the_demo() -> None:
    """Two real servers: text, acceptance and speed of both, and the same output. On a machine without a compiler."""
    result = subprocess.run(DEMO, env=WITHOUT_COMPILER, capture_output=True, text=True, timeout=570)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no C++ compiler" in result.stdout
    assert "the output is the same" in result.stdout
    accepted = re.search(r"such\s+a\s+round\s+made\s+(\S+)\s+tokens", result.stdout)
    assert accepted is not None
    assert float(accepted[1]) > 1.5
    # The prompts and what was made of them, and a row of each in the table: the last column says "yes".
    for prompt in ("def walk", "class Stack", "class TestQueue", "def parse_args", "all"):
        row = re.search(
            rf"^\W*{prompt}\s+\W*(\d+)\W+(\d+)\W+([\d.]+)\W+([\d.]+|no draft)\W+yes\W*$", result.stdout, re.M
        )
        assert row is not None, f"{prompt}:\n{result.stdout}"
        assert min(float(row[1]), float(row[2])) > 1
    (written,) = re.findall(
        r"self\._items = \[\]\n\n    def push\(self, item\):\n(.+?)\nimport unittest", result.stdout, re.S
    )
    assert len(written.split()) > 5


@pytest.mark.server
def test_a_signal_while_it_serves_leaves_no_process_behind() -> None:
    """Of two real servers one is up, and the other starts."""
    demo = subprocess.Popen(
        DEMO, env=WITHOUT_COMPILER, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1
    )
    try:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "Starting vLLM without" in line:
                break
        started = psutil.Process(demo.pid).children(recursive=True)
        assert len(started) >= 3
        demo.send_signal(signal.SIGINT)
        demo.communicate(timeout=120)
        assert demo.returncode == 128 + signal.SIGINT
        _, left = psutil.wait_procs(started, timeout=60)
        assert not left
    finally:
        demo.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_no_process_behind(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C, while the first server starts, ends it and all that it started."""
    python, vllm, pids = tmp_path / "python", tmp_path / "vllm", tmp_path / "pids"
    python.symlink_to(sys.executable)
    vllm.write_text(STUB)
    vllm.chmod(0o755)
    os.mkfifo(pids)
    os.mkfifo(f"{pids}.never")
    environment = os.environ | {"PIDS": str(pids), "PYTHONPATH": sysconfig.get_path("purelib"), "TMPDIR": str(tmp_path)}
    demo = subprocess.Popen([python, SCRIPT], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        *started, tracker, memory = pids.read_text().split()
        demo.send_signal(number)
        demo.communicate(timeout=60)
        assert demo.returncode == 128 + number
        assert not [pid for pid in started if alive(pid)]
        # The tracker ends by itself, when all whose memory it tracks have.
        with suppress(psutil.NoSuchProcess):
            psutil.Process(int(tracker)).wait(timeout=60)
        assert not Path("/dev/shm", memory).exists()
        assert not list(tmp_path.glob("vllm-del-demo-*.log"))
    finally:
        demo.kill()


def test_nothing_to_measure_is_refused() -> None:
    result = subprocess.run([sys.executable, SCRIPT, "--max-tokens", "0"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "--max-tokens" in result.stderr


def alive(pid: str) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    status = Path("/proc", pid, "status")
    return status.exists() and "\nState:\tZ" not in status.read_text()
