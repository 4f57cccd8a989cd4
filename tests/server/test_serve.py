"""The main job, as a user runs it: `vllm serve MODEL --speculative-config del`, and the OpenAI client."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import BadRequestError, OpenAI

from tests.conftest import DEMO_MODEL
from tests.engine.checkpoints import checkpoint

START_SECONDS = 300
STOP_SECONDS = 60
PROMPTS = [
    "def __init__(self, ",
    "import os\nimport sys\n\n\nclass ",
    "    for name in sorted(",
    "        raise ValueError(",
]

pytestmark = pytest.mark.server


class Server:
    """A running server, and the log it writes."""

    def __init__(self, log: Path, model: Path = DEMO_MODEL, spec: str = "del", *more: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        self.url = f"http://127.0.0.1:{self.port}"
        command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--speculative-config", spec]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "demo"]
        command += ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8"]
        command += ["--per-request-spec-decode-metrics", "summary", *more]
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait_until_healthy(self) -> None:
        # connect() retries inside the transport, so that waiting costs no polling code of ours
        for _ in range(START_SECONDS):
            if self.process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/health", timeout=1).status_code == 200:
                    return
            except httpx.TransportError:
                self._wait_a_second()
        pytest.fail(f"the server did not come up:\n{self.log.read_text()[-4000:]}")

    def _wait_a_second(self) -> None:
        try:
            self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return

    def metric(self, name: str) -> float:
        """The sum of a counter over its labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        values = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, flags=re.MULTILINE)
        assert values, f"/metrics has no {name}"
        return sum(map(float, values))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server") / "log.txt")
    try:
        server.wait_until_healthy()
        yield server
    finally:
        if server.process.poll() is None:
            os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait(STOP_SECONDS)


def test_serve_stream_four_at_once_count_and_stop(server: Server) -> None:
    """One test, as the parts follow from each other: the counts are of these requests, the end is the server's."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert "DelConfig(method='del'" in server.log.read_text()
    assert re.search(r"del: LlamaForCausalLM drafts for itself, up to \d+ tokens a round", server.log.read_text())

    stream = client.completions.create(model="demo", prompt=PROMPTS[0], max_tokens=64, temperature=0, stream=True)
    chunks = [chunk.choices[0].text for chunk in stream]
    assert len(chunks) > 1
    assert "".join(chunks).strip()

    def complete(prompt: str) -> str:
        answer = client.completions.create(model="demo", prompt=prompt, max_tokens=64, temperature=0)
        return answer.choices[0].text

    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(complete, PROMPTS))
    assert texts[0] == "".join(chunks)

    rounds = server.metric("vllm:spec_decode_num_drafts_total")
    drafted = server.metric("vllm:spec_decode_num_draft_tokens_total")
    accepted = server.metric("vllm:spec_decode_num_accepted_tokens_total")
    assert rounds > 0
    assert drafted >= rounds
    assert 0 < accepted <= drafted

    # Where the tokens left, and that a request may say how it wants it.
    assert 0 < server.metric("vllm:del_accepted_tokens_total") <= server.metric("vllm:del_drafted_tokens_total")
    assert server.metric("vllm:del_measured_seconds_total") > 0

    def complete_with(wish: str) -> dict[str, Any]:
        """The same text as before; what vLLM says of this request's drafts."""
        body = {"vllm_xargs": {"del": wish}}
        answer = client.completions.create(
            model="demo", prompt=PROMPTS[0], max_tokens=64, temperature=0, extra_body=body
        )
        assert answer.choices[0].text == texts[0]
        return (answer.model_extra or {})["metrics"]["speculative_decoding"]

    drafted = server.metric("vllm:spec_decode_num_draft_tokens_total")
    assert complete_with('{"enabled": false}')["num_draft_tokens"] == 0
    assert server.metric("vllm:spec_decode_num_draft_tokens_total") == drafted
    with pytest.raises(BadRequestError, match=r"max_draft.*-1 is not understood"):
        complete_with('{"max_draft": -1}')
    short = complete_with('{"max_draft": 2}')
    assert short["num_accepted_draft_tokens"] > 0
    assert not any(short["acceptance_histogram"][3:])
    assert server.metric("vllm:spec_decode_num_draft_tokens_total") == drafted + short["num_draft_tokens"]

    children = psutil.Process(server.process.pid).children(recursive=True)
    assert children
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(STOP_SECONDS) == 0
    _, left = psutil.wait_procs(children, STOP_SECONDS)
    assert not left


def test_a_model_that_cannot_draft_for_itself_is_refused_with_the_reason(tmp_path: Path, checkpoints: Path) -> None:
    """Its form is found out when it is loaded, in a process of the server's: who started it has to see the reason."""
    log = tmp_path / "log.txt"
    spec = '{"method": "del", "del_policy": "fixed"}'
    server = Server(log, Path(checkpoint(checkpoints, "granite")), spec, "--enforce-eager")
    try:
        assert server.process.wait(START_SECONDS) != 0
    finally:
        if server.process.poll() is None:
            os.killpg(server.process.pid, signal.SIGKILL)
    assert "GraniteForCausalLM cannot draft for itself: it calls its layers as" in log.read_text()
