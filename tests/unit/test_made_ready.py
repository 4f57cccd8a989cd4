"""What a fused head launches is compiled, and tuned, before it serves."""

import pytest
import torch
from vllm_del.kernels.exit_head.triton import rows_together

from vllm_del.draft.head import Head
from vllm_del.engine import head as head_module
from vllm_del.engine.head import TRIED_ROWS, try_out


class Noted(Head):
    """Says the same of all rows, and notes how many they were."""

    def __init__(self) -> None:
        self.said: list[int] = []
        self.agreed: list[int] = []

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.said.append(len(hidden_states))
        return torch.zeros(len(hidden_states), dtype=torch.int64), torch.ones(len(hidden_states))

    def agree(self, hidden_states: torch.Tensor, expected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.agreed.append(len(hidden_states))
        return expected == 0, torch.ones(len(hidden_states))

    def __str__(self) -> str:
        return "a head"


def test_every_way_to_compile_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(head_module.logger, "info_once", lambda text, *values: said.append(text % values))
    head = Noted()
    try_out(head, torch.zeros(50, 8))
    in_service = {rows_together(rows) for rows in range(1, 3000)}
    for tried in (head.said, head.agreed):
        assert {rows_together(rows) for rows in tried} == in_service
        # The most of each way, which decides what blocks suit it.
        assert tried == sorted(in_service) == list(TRIED_ROWS)
    (line,) = said
    assert line.startswith("del: a head made ready in ")
