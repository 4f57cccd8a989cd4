"""Two tensor-parallel ranks draft the same tokens and verify them as one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.checkpoints import checkpoint
from tests.engine.host import Host

PROMPTS = [[5], [7, 8, 9, 10, 11], list(range(20, 70))]
GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def own_host() -> Iterator[Host]:
    """A process for these engines alone.

    Where the common one has to give up an engine, vLLM ends the parallel groups of the process, and only an engine
    that runs in it makes them again: one whose ranks are processes of their own leaves the kept ones without.
    """
    host = Host("v1")
    yield host
    host.close()


@pytest.mark.parametrize("objective", ["goodput", "tpl"])
def test_lossless_over_two_ranks(own_host: Host, checkpoints: Path, objective: str) -> None:
    """Under goodput the ranks measure for real, and may find that nothing pays; that they agree is what is tested."""
    model = checkpoint(checkpoints, "llama")
    spec = {"method": "del", "del_exit_layers": 2, "del_objective": objective}
    alone = own_host.generate(model, PROMPTS, GREEDY)
    shared = own_host.generate(model, PROMPTS, GREEDY, spec, tensor_parallel_size=2)
    assert shared.completions == alone.completions
    assert shared.accepted > 0 or objective == "goodput"
