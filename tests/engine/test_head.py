"""Which head drafts: the kernel on V2 where it says what the model says, the model's own everywhere else."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import host as engines
from tests.engine.checkpoints import checkpoint
from tests.engine.host import Host
from tests.engine.test_drafts import drafter_of

SPEC = {"method": "del", "del_policy": "fixed", "del_exit_layers": 2, "num_speculative_tokens": 3}

pytestmark = pytest.mark.engine


def _drafter(model: str) -> Any:
    return drafter_of(engines._engine(model, SPEC, {}))


def _kind(model: str) -> str:
    return type(_drafter(model).head).__name__


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gemma2"])
def test_fused_where_triton_runs(host: Host, checkpoints: Path, architecture: str) -> None:
    """Whether its tokens are right is seen by what is drafted, see test_drafts.py."""
    expected = {"v1": "LogitsHead", "v2": "FusedHead"}
    assert host.call(_kind, checkpoint(checkpoints, architecture)) == expected[host.runner]


def _kinds_of_changed_models(model: str, dtype: str) -> dict[str, str]:
    """What is chosen for models that do something else to their logits."""
    from vllm_del.engine.head import make_whole_head

    target = drafter_of(engines._engine(model, SPEC, {"dtype": dtype})).model.target
    plain = target.compute_logits
    changed = {
        "as it is": plain,
        "scaled": lambda states: plain(states) * 0.5,
        "shifted": lambda states: plain(states).roll(1, -1),
        "masked": lambda states: plain(states).index_fill(1, torch.arange(0, 100, 2), -torch.inf),
    }
    kinds = {}
    for name, compute_logits in changed.items():
        target.compute_logits = compute_logits
        kinds[name] = type(make_whole_head(target)).__name__
    if dtype == "bfloat16":
        # Large logits are rounded by as much more: no fault of the kernel's.
        weight = target.lm_head.weight
        weight.data.mul_(32)
        # Not the model's own: a CPU may have another copy of the weight, packed.
        target.compute_logits = lambda states: torch.nn.functional.linear(states, weight)
        kinds["large"] = type(make_whole_head(target)).__name__
        weight.data.div_(32)
    del target.compute_logits
    processor = target.logits_processor
    processor.head_dtype, before = torch.float64, processor.head_dtype
    kinds["wider"] = type(make_whole_head(target)).__name__
    processor.head_dtype = before
    return kinds


@pytest.mark.parametrize("host", ["v2"], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_not_fused_where_the_model_says_something_else(host: Host, checkpoints: Path, dtype: str) -> None:
    kinds = host.call(_kinds_of_changed_models, checkpoint(checkpoints, "llama"), dtype)
    assert kinds.pop("as it is") == kinds.pop("large", "FusedHead") == "FusedHead"
    assert set(kinds.values()) == {"LogitsHead"}, kinds
