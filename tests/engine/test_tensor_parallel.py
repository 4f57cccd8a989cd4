"""Two tensor-parallel ranks draft the same tokens and verify them as one."""

from pathlib import Path

import pytest

from tests.engine.checkpoints import checkpoint
from tests.engine.host import Host

PROMPTS = [[5], [7, 8, 9, 10, 11], list(range(20, 70))]
GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("host", ["v1"], indirect=True)
def test_lossless_over_two_ranks(host: Host, checkpoints: Path) -> None:
    model = checkpoint(checkpoints, "llama")
    alone = host.generate(model, PROMPTS, GREEDY, {"method": "del", "del_exit_layers": 2})
    shared = host.generate(model, PROMPTS, GREEDY, {"method": "del", "del_exit_layers": 2}, tensor_parallel_size=2)
    assert shared.completions == alone.completions
    assert shared.accepted > 0
