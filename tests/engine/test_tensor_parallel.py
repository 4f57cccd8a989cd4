"""Two tensor-parallel ranks draft the same tokens and verify them as one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.checkpoints import checkpoint
from tests.engine.host import COSTS, Host
from vllm_del.policy.cost import MeasuredCosts

PROMPTS = [[5], [7, 8, 9, 10, 11], list(range(20, 70))]
GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}

pytestmark = pytest.mark.engine


@pytest.fixture
def own_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A process for these engines alone, which keeps its costs in `tmp_path`.

    Where the common one has to give up an engine, vLLM ends the parallel groups of the process, and only an engine
    that runs in it makes them again: one whose ranks are processes of their own leaves the kept ones without.
    """
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    host = Host("v1")
    yield host
    host.close()


@pytest.mark.parametrize("objective", ["goodput", "tpl"])
def test_lossless_over_two_ranks(own_host: Host, checkpoints: Path, tmp_path: Path, objective: str) -> None:
    """Under goodput the ranks measure for real, and may find that nothing pays; from costs that they find saved, by
    which it does, they draft."""
    model = checkpoint(checkpoints, "llama")
    spec = {"method": "del", "del_exit_layers": 2, "del_objective": objective}
    alone = own_host.generate(model, PROMPTS, GREEDY)
    shared = own_host.generate(model, PROMPTS, GREEDY, spec, tensor_parallel_size=2)
    assert shared.completions == alone.completions
    if objective == "goodput":
        (saved,) = (tmp_path / "vllm_del").glob("costs-*.json")
        # Less than any machine takes, or they would be measured again.
        saved.write_text(MeasuredCosts(**_times(1e-6, COSTS)).to_json())
        # Another engine, of the same costs.
        shared = own_host.generate(model, PROMPTS, GREEDY, spec, tensor_parallel_size=2, disable_log_stats=False)
        assert shared.completions == alone.completions
    assert shared.accepted > 0


def _times(factor: float, costs: dict[str, Any]) -> dict[str, Any]:
    """The same costs, in other seconds."""

    def scaled(values: Any) -> Any:
        return tuple(factor * value for value in values) if isinstance(values, tuple) else factor * values

    return {
        name: values if name in ("rows", "head_rows", "tokens") else scaled(values) for name, values in costs.items()
    }
