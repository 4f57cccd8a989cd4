"""ExitHead: from what the layers give at an exit to draft tokens."""

import torch
from torch import nn


class ExitHead:
    """The target's LM head as a draft head: the most probable token of each row, and how probable it is.

    Goes through the target's `compute_logits`, which knows about quantised heads, logit scales and soft-caps, and
    vocabulary shards under tensor parallelism.
    """

    def __init__(self, target: nn.Module) -> None:
        self._compute_logits = target.compute_logits

    def __call__(
        self,
        # [rows, hidden size]
        hidden_states: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [rows] int64, the first of equals, and their probabilities [rows] float32 at temperature 1."""
        logits = self._compute_logits(hidden_states).float()
        largest, token = logits.max(dim=-1)
        return token, torch.exp(largest - logits.logsumexp(-1))
