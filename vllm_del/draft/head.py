"""Draft heads: from what the layers give at an exit to draft tokens.

A head is called with what the LM head reads of each row, [rows, hidden size], and gives the most probable tokens,
[rows] int64, the first of equals, and their probabilities at temperature 1, [rows] float32.
"""

from collections.abc import Callable

import torch

from vllm_del.kernels.exit_head import HeadTokens, exit_head, merge

Head = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class LogitsHead:
    """Through the target's `compute_logits`, which knows about quantised heads and whatever else its model does."""

    def __init__(self, compute_logits: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._compute_logits = compute_logits

    def __call__(
        self,
        # [rows, hidden size]
        hidden_states: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self._compute_logits(hidden_states).float()
        largest, token = logits.max(dim=-1)
        return token, torch.exp(largest - logits.logsumexp(-1))


class FusedHead:
    """One read of the weight, and no logits: over a whole vocabulary, or a shard of it in each rank."""

    def __init__(
        self,
        # [vocabulary, hidden size], and the token of its first row
        weight: torch.Tensor,
        first_token: int,
        soft_cap: float | None,
        logit_scale: float,
        # puts what each rank has one after the other, along a dimension; None if there is one rank
        all_gather: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
    ) -> None:
        self.weight = weight
        self._options = {"first_token": first_token, "soft_cap": soft_cap, "logit_scale": logit_scale}
        self._all_gather = all_gather

    def __call__(
        self,
        # [rows, hidden size]
        hidden_states: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        said = exit_head(hidden_states, self.weight, **self._options)
        if self._all_gather is not None:
            # In one message: token numbers are exact in float64.
            packed = torch.stack([values.double() for values in said]).unsqueeze(0)
            token, *values = self._all_gather(packed, 0).unbind(1)
            said = merge(HeadTokens(token.long(), *(value.float() for value in values)))
        return said.token, said.probability
