"""See `del` work: serve a model with vLLM twice, with `del` and without, and compare the output and the speed.

    scripts/demo.sh
    scripts/demo.sh --model MODEL --max-tokens 256 -- --dtype bfloat16

Both servers get the same flags, but for `--speculative-config del`. They take turns with every prompt, so that a
machine that is slower for a while is so for both; the one whose turn it is not is idle. In float32, the default here,
greedy output has to be the same with both.
"""

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import urlopen

import psutil
from openai import OpenAI, OpenAIError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

DEMO_MODEL = Path(__file__).resolve().parent / "demo_model"
PROMPTS = {
    "def walk": 'import os\n\n\ndef walk(top, topdown=True, onerror=None):\n    """Directory tree generator.\n',
    "class Stack": "class Stack:\n    def __init__(self):\n        self._items = []\n\n    def push(self, item):\n",
    "class TestQueue": "import unittest\n\n\nclass TestQueue(unittest.TestCase):\n    def test_empty(self):\n",
    "def parse_args": "def parse_args(argv=None):\n    parser = argparse.ArgumentParser(\n",
}
ABOUT_DEMO_MODEL = (
    "The demo model has 7 million parameters. It writes what looks like Python and knows nothing; greedy, it soon "
    "repeats itself, which is easy to draft."
)
REPEATS = 5
# What others may use of the processors, in percent, before figures are not worth much.
BUSY = 25
START_TIMEOUT_S = 900
STOP_TIMEOUT_S = 15
SERVER_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
# The demo model is so small that on a CPU a second thread costs more in waiting than it brings, with `del` and without.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
# Two servers share a GPU; a CPU has the first line.
SERVER_FLAGS = ["--dtype", "float32", "--max-model-len", "1024", "--gpu-memory-utilization", "0.4"]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

console = Console(highlight=False)


class ServerError(Exception):
    """A server did not start, or did not answer; the message has the end of its log."""


@dataclass
class Measurement:
    """What a server made of a prompt, over all repeats."""

    texts: set[str] = field(default_factory=set)
    num_tokens: int = 0
    # From request to response, one a repeat.
    seconds: list[float] = field(default_factory=list)
    # "num_drafts", rounds that drafted, and "num_accepted_tokens", drafted tokens that verification kept.
    counters: Counter[str] = field(default_factory=Counter)


@dataclass(eq=False)
class Server:
    """A vLLM server, as its client sees it. Every completion is greedy, one at a time."""

    label: str
    url: str
    log: Path
    complete: Callable[..., Any]

    def stream(self, prompt: str) -> Iterator[str]:
        """The completion of `prompt`, piece by piece."""
        with self.reporting():
            for chunk in self.complete(prompt=prompt, stream=True):
                yield chunk.choices[0].text

    def measure(self, prompt: str, result: Measurement) -> None:
        """Complete `prompt` and add what came of it to `result`."""
        with self.reporting():
            result.counters.subtract(self._speculation_counters())
            start = time.perf_counter()
            answer = self.complete(prompt=prompt)
            result.seconds.append(time.perf_counter() - start)
            result.num_tokens = answer.usage.completion_tokens
            result.texts.add(answer.choices[0].text)
            result.counters.update(self._speculation_counters())

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Raise what goes wrong in talking to the server as a `ServerError`, with the end of the server's log."""
        try:
            yield
        except (OpenAIError, OSError) as error:
            message = f"{self.last_lines(30)}\n\nvLLM {self.label}: {error}\nIts whole log: {self.log}"
            raise ServerError(message) from error

    def last_lines(self, count: int) -> str:
        """The end of the server's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])

    def says(self) -> str:
        """What the server's log told last that is no warning."""
        told = re.findall(r"INFO .*?\] (.*)", self.log.read_text(errors="replace"))
        return told[-1] if told else ""

    def _speculation_counters(self) -> Counter[str]:
        """What vLLM counted about drafts since the server started; nothing without speculation."""
        with urlopen(f"{self.url}/metrics", timeout=30) as answer:
            metrics = answer.read().decode()
        counters: Counter[str] = Counter()
        pattern = r"^vllm:spec_decode_(num_drafts|num_accepted_tokens)_total\S* (\S+)$"
        for name, value in re.findall(pattern, metrics, re.MULTILINE):
            counters[name] += int(float(value))
        return counters


@contextmanager
def serve(label: str, port: int, options: argparse.Namespace, *flags: str) -> Iterator[Server]:
    """Start `vllm serve`, wait until it answers, and leave no process of it behind, whatever happens.

    Raises `ServerError` if it does not come up.
    """
    command = [str(Path(sys.executable).with_name("vllm")), "serve", options.model, "--served-model-name", "demo"]
    command += ["--host", "127.0.0.1", "--port", str(port), *SERVER_FLAGS, *flags, *options.vllm_args]
    command += [] if can_compile() else ["--enforce-eager"]
    environment = SERVER_ENVIRONMENT | (ONE_THREAD if options.model == str(DEMO_MODEL) else {}) | os.environ
    if Path(options.model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    url, keep_log = f"http://127.0.0.1:{port}", False
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
    complete = partial(client.completions.create, model="demo", max_tokens=options.max_tokens, temperature=0)
    with tempfile.NamedTemporaryFile("w", prefix="vllm-del-demo-", suffix=".log", delete=False) as log:
        # In a session of its own: Ctrl-C reaches this script only, which then ends the whole group.
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            server = Server(label, url, Path(log.name), complete)
            with server.reporting():
                wait_until_healthy(server, process)
            yield server
        except ServerError:
            keep_log = True
            raise
        finally:
            stop(process)
            if not keep_log:
                os.unlink(log.name)


def can_compile() -> bool:
    """Whether vLLM can compile a model: on a CPU that takes a C++ compiler."""
    return not version("vllm").endswith("+cpu") or bool(shutil.which(os.environ.get("CXX", "g++")))


def wait_until_healthy(server: Server, process: subprocess.Popen) -> None:
    """Poll the server's /health; meanwhile, on a terminal, show the time and the last word of the log."""
    start = time.monotonic()
    console.print(f"Starting vLLM {server.label} ...")
    with console.status("") as status:
        while (elapsed := time.monotonic() - start) < START_TIMEOUT_S:
            with suppress(OSError), urlopen(f"{server.url}/health", timeout=5):
                console.print(f"vLLM {server.label} is up after {elapsed:.0f} s")
                return
            if process.poll() is not None:
                raise ChildProcessError(f"ended with exit code {process.returncode} while starting")
            status.update(f"{elapsed:3.0f} s [dim]{escape(server.says()[: max(0, console.width - 12)])}[/]")
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.25)  # /health can only be asked again; an end is noticed at once
    raise TimeoutError(f"did not answer within {START_TIMEOUT_S} s")


def stop(process: subprocess.Popen) -> None:
    """End the server and every process that it started: asked first, killed then."""
    try:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    finally:
        # Once more while there are any: one may just have started another.
        while left := [member for member in group_of(process.pid) if not is_tracker(member)]:
            for member in left:
                with suppress(psutil.Error):
                    member.kill()
            psutil.wait_procs(left, timeout=1)
        process.wait()


def group_of(number: int) -> list[psutil.Process]:
    """The processes of a process group that have not ended."""
    members = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) == number and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


def is_tracker(process: psutil.Process) -> bool:
    """Whether it is Python's resource tracker, which ends by itself and then removes shared memory that was left."""
    with suppress(psutil.Error):
        return any("resource_tracker" in argument for argument in process.cmdline())
    return False


def leave(number: int, frame: object) -> None:
    """On a signal: unwind, which stops the servers, and let no further signal interrupt that."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    with suppress(OSError, RuntimeError):  # nobody may be there to read it
        print("\nStopping the servers ...", file=sys.stderr, flush=True)
    sys.exit(128 + number)


def free_ports(first: int) -> list[int]:
    """Two loopback ports that nothing listens on: `first` and the next, or any if `first` is 0."""
    with ExitStack() as stack:
        wanted = [first, first + 1] if first else [0, 0]
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", port))) for port in wanted]
        return [probe.getsockname()[1] for probe in probes]


def compare(with_del: Server, without: Server) -> tuple[list[Measurement], list[Measurement]]:
    """Show what `with_del` writes, which warms it up; warm up `without`; then measure both in turns."""
    for prompt in PROMPTS.values():
        console.print(f"\n[bold]{escape(prompt)}[/]", end="", soft_wrap=True)
        for piece in with_del.stream(prompt):
            console.print(piece, style="green", end="", markup=False, soft_wrap=True)
        console.print()
        "".join(without.stream(prompt))
    results = {server: [Measurement() for _ in PROMPTS] for server in (without, with_del)}
    with console.status(f"Measuring: {REPEATS} repeats of {len(PROMPTS)} prompts, with del and without in turns"):
        for _ in range(REPEATS):
            for index, prompt in enumerate(PROMPTS.values()):
                for server, measurements in results.items():
                    server.measure(prompt, measurements[index])
    return results[with_del], results[without]


def report(with_del: Sequence[Measurement], without: Sequence[Measurement]) -> None:
    """The table, and what it comes to in words."""
    table = Table("prompt", title=f"\nOne request at a time, greedy, median of {REPEATS} repeats", title_justify="left")
    for heading in ("tokens/s\nwithout", "tokens/s\nwith del", "\nspeed-up", "accepted\nper round", "same\noutput"):
        table.add_column(heading, justify="right")

    def add(label: str, on: Sequence[Measurement], off: Sequence[Measurement]) -> tuple[float, float, bool]:
        fast, slow = (sum(m.num_tokens for m in side) / sum(median(m.seconds) for m in side) for side in (on, off))
        rounds = sum(m.counters["num_drafts"] for m in on)
        accepted = sum(m.counters["num_accepted_tokens"] for m in on) / max(rounds, 1)
        same = all(len(x.texts) == 1 and x.texts == y.texts for x, y in zip(on, off, strict=True))
        cells = [f"{slow:.0f}", f"{fast:.0f}", f"{fast / slow:.2f}", f"{accepted:.2f}" if rounds else "no draft"]
        table.add_row(label, *cells, "yes" if same else "[bold red]no[/]")
        return fast / slow, accepted, same

    for label, on, off in zip(PROMPTS, with_del, without, strict=True):
        add(label, [on], [off])
    table.add_section()
    speed_up, accepted, same = add("all", with_del, without)
    console.print(table)
    console.print(
        "Accepted per round: drafted tokens that verification kept, over the rounds that drafted (vLLM's metrics "
        "spec_decode_num_accepted_tokens over spec_decode_num_drafts). Verification adds one token of its own, so "
        f"such a round made {accepted + 1:.2f} tokens.\n\n"
        f"[bold]With del, {'faster' if speed_up > 1 else 'slower'}: {speed_up:.2f} times the speed; "
        f"the output is {'the same' if same else '[red]not the same[/]'}.[/]"
    )


def parse_args() -> argparse.Namespace:
    """The options, and in `vllm_args` whatever follows `--`."""
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="scripts/demo.sh",
        usage="%(prog)s [options] [-- VLLM_ARGUMENT ...]",
        description="Serve a model with vLLM twice, with `del` and without, and compare output and speed. "
        "What follows -- goes to both servers, after the flags that the demo sets itself.",
    )
    parser.add_argument("--model", default=str(DEMO_MODEL), help="path or name (default: the model shipped here)")
    parser.add_argument("--max-tokens", type=positive, default=128, help="tokens to write for a prompt (default: 128)")
    parser.add_argument("--port", type=int, default=0, help="first of two loopback ports (default: free ones)")
    parser.add_argument("--speculative-config", default="del", help="of the server with del (default: %(default)s)")
    return parser.parse_args(arguments[:cut], argparse.Namespace(vllm_args=arguments[cut + 1 :]))


def positive(text: str) -> int:
    """A number of tokens; raises `ValueError`, which argparse reports, where there would be nothing to measure."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def main() -> int:
    """Run the demo; its exit code."""
    options = parse_args()
    for number in SIGNALS:
        signal.signal(number, leave)
    os.environ["no_proxy"] = "127.0.0.1"  # a proxy that is set is not for the loopback
    if (busy := psutil.cpu_percent(interval=1)) > BUSY:
        console.print(f"The machine is busy (its processors to {busy:.0f}%): expect lower, uneven figures.")
    if not can_compile():
        console.print("There is no C++ compiler (g++): the models are not compiled, which is slower.")
    try:
        ports = free_ports(options.port)
        with (
            serve("with del", ports[0], options, "--speculative-config", options.speculative_config) as with_del,
            serve("without", ports[1], options) as without,
        ):
            if options.model == str(DEMO_MODEL):
                console.print(f"\n{ABOUT_DEMO_MODEL}")
            measurements = compare(with_del, without)
    except (ServerError, OSError) as error:
        console.print(str(error), markup=False)
        return 1
    report(*measurements)
    return 0


if __name__ == "__main__":
    sys.exit(main())
