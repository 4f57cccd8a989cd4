"""Drafting begins again as soon as it pays, wherever in its last block a sequence then is.

A sequence that wants no drafts gets no block for them: the room that it has is what is left of its last block, which
is none where the next token is to begin another one. A plan that went by that, and served as many rounds as a block
has slots, would be made at the same place of each block.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import host as engines
from tests.engine.checkpoints import checkpoint
from tests.engine.host import Host
from tests.engine.test_drafts import drafter_of
from vllm_del.draft.clock import MOST_ROUNDS, Pace

BLOCK = engines.ENGINE_DEFAULTS["block_size"]
SPEC = {"method": "del", "del_exit_layers": [1, 2], "num_speculative_tokens": 3}
# Where planning takes very long, plans are made in rounds 0 and `MOST_ROUNDS`, and from the next one on drafts pay.
PLANS, ROUNDS = 2, 2 * MOST_ROUNDS

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("prompt_length", [BLOCK - 1, BLOCK])
def test_drafts_begin_again(host: Host, checkpoints: Path, prompt_length: int) -> None:
    model = checkpoint(checkpoints, "llama")
    host.call(_pay_later, model)
    try:
        sampling = {"temperature": 0, "max_tokens": ROUNDS + 20, "ignore_eos": True}
        outcome = host.generate(model, [[5] * prompt_length], sampling, SPEC)
    finally:
        work = host.call(_as_before, model)
    assert work["plans"] == PLANS + 1
    assert outcome.drafted > 0
    assert outcome.steps > ROUNDS


def _policy(model: str) -> Any:
    return drafter_of(engines._engine(model, SPEC, {})).policy


def _pay_later(model: str) -> None:
    """In the engine's process: plans serve as many rounds as they may; at first hardly a draft is accepted."""
    policy = _policy(model)
    work = policy.counted_work = Counter()
    policy.usual_pace, policy.pace = policy.pace, Pace(1e6, policy.planner.costs, learns=False)

    def estimate(slots: torch.Tensor) -> torch.Tensor:
        work["plans"] += 1
        return torch.full((len(slots), 2), 0.01 if work["plans"] <= PLANS else 0.99, dtype=torch.float64)

    policy.statistics.estimate = estimate


def _as_before(model: str) -> dict[str, int]:
    policy = _policy(model)
    policy.pace = policy.usual_pace
    del policy.statistics.estimate
    return dict(policy.counted_work)
