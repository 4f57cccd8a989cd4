"""scripts/demo.py: once for real, and stopped from outside while its servers start."""

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


@pytest.mark.server
def test_the_demo() -> None:
    """Two real servers: text, acceptance and speed of both, and the same output.

    Not compiled, which takes minutes: tests/server does that.
    """
    command = [sys.executable, SCRIPT, "--max-tokens", "24", "--", "--enforce-eager"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=570)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the output is the same" in result.stdout
    accepted = re.search(r"such\s+a\s+round\s+made\s+(\S+)\s+tokens", result.stdout)
    assert accepted is not None
    assert float(accepted[1]) > 1.5


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
