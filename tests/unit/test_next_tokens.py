"""V1: the next token of each row is looked for, in vLLM's way, only where there is something to look for."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from vllm_del.engine.proposer import DelProposer

LOOKED_FOR = object()


@pytest.mark.parametrize(
    ("sampled", "unfinished", "found"),
    [
        ([[5], [6], [7]], [], [5, 6, 7]),
        # Rows in the middle of their prompts, and rows with drafts
        ([[5], [6], [7]], [1], None),
        ([[5, 8, -1], [6, -1, -1], [7, 8, 9]], [], None),
    ],
)
def test_one_token_a_row(
    engine_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    sampled: list[list[int]],
    unfinished: list[int],
    found: list[int] | None,
) -> None:
    vllm_config = engine_config(speculative_config="del")
    with set_current_vllm_config(vllm_config):
        proposer = object.__new__(DelProposer)
        proposer.__init__(vllm_config, torch.device("cpu"), SimpleNamespace())  # type: ignore[misc]
    monkeypatch.setattr(DraftModelProposer, "prepare_next_token_ids_padded", lambda *args: (LOOKED_FOR, args))
    # As the runner's, it goes on behind the rows, with what earlier batches left there.
    mask = torch.ones(8, dtype=torch.bool)
    mask[: len(sampled)] = False
    mask[unfinished] = True
    given = torch.tensor(sampled), {}, SimpleNamespace(), mask
    tokens, counts = proposer.prepare_next_token_ids_padded(*given)
    if found is None:
        assert (tokens, counts) == (LOOKED_FOR, (proposer, *given))
    else:
        assert tokens.tolist() == found
        assert counts.tolist() == [1] * len(found)
        assert tokens.dtype == counts.dtype == torch.int32
