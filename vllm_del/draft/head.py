"""ExitHead: from the hidden states at an exit to draft tokens."""

import torch
from torch import nn


class ExitHead:
    """The target's LM head as a draft head: the most probable token of each row.

    Goes through the target's `compute_logits`, which knows about quantised heads, logit scales and soft-caps, and
    vocabulary shards under tensor parallelism.
    """

    def __init__(self, target: nn.Module) -> None:
        self._compute_logits = target.compute_logits

    def __call__(
        self,
        # [rows, hidden size]
        hidden_states: torch.Tensor,
    ) -> torch.Tensor:
        """Draft tokens [rows] int64, the first of equals."""
        return self._compute_logits(hidden_states).argmax(dim=-1)
