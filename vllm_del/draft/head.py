"""Draft heads: from what the layers give at an exit to draft tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_del.kernels.exit_head import HeadTokens, exit_head, merge
from vllm_del.kernels.shadow_agree import shadow_agree


class Head(ABC):
    """What is called with what the LM head reads of each row; its text is for the log."""

    @abstractmethod
    def __call__(
        self,
        # [rows, hidden size]
        hidden_states: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The most probable tokens, [rows] int64, the first of equals, and their probabilities at temperature 1, [rows]
        float32."""

    def agree(
        self,
        # [rows, hidden size], and [rows] int64
        hidden_states: torch.Tensor,
        expected: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether these are the expected tokens, [rows] bool, and the same probabilities."""
        token, probability = self(hidden_states)
        return token == expected, probability


class LogitsHead(Head):
    """Through the target's `compute_logits`, which knows about quantised heads and whatever else its model does."""

    def __init__(self, compute_logits: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._compute_logits = compute_logits

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self._compute_logits(hidden_states)
        return (most_probable_on_cpu if logits.device.type == "cpu" else most_probable)(logits)

    def __str__(self) -> str:
        return "LM head"


def most_probable(
    # [rows, vocabulary]
    logits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a `Head` says of logits: tokens and probabilities."""
    logits = logits.float()
    largest, token = logits.max(dim=-1)
    return token, torch.exp(largest - logits.logsumexp(-1))


def most_probable_on_cpu(
    # [rows, vocabulary]
    logits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in a third of the time or less (two cores, 1 to 16 rows of 32,000): there torch's `max` with indices is
    not vectorised, and `softmax` is one operation where `logsumexp` is several."""
    logits = logits.float()
    return torch.from_numpy(logits.numpy().argmax(-1)), logits.softmax(-1).amax(-1)


@dataclass(frozen=True)
class PlainHead:
    """An LM head that is a matrix, and what its model does to the logits."""

    # [vocabulary, hidden size], and the token of its first row: the whole head, or a shard of it in each rank
    weight: torch.Tensor
    first_token: int
    soft_cap: float | None
    logit_scale: float
    # puts what each rank has one after the other, along a dimension; None if there is one rank
    all_gather: Callable[[torch.Tensor, int], torch.Tensor] | None = None

    def finish(
        self,
        # [rows, tokens]
        products: torch.Tensor,
    ) -> torch.Tensor:
        """Logits, float32: what the model does to what its matrix gives."""
        logits = products.float()
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits * self.logit_scale


class FusedHead(Head):
    """One read of the weight, and no logits: over a whole vocabulary, or a shard of it in each rank."""

    def __init__(
        self,
        plain: PlainHead,
        # [vocabulary] float32: of a weight in FP8, what each row is to be multiplied by
        row_scales: torch.Tensor | None = None,
        # [kept] int64, ascending: the tokens that take part; all if None
        shortlist: torch.Tensor | None = None,
    ) -> None:
        self.plain = plain
        self._options: dict[str, Any] = {
            "first_token": plain.first_token,
            "soft_cap": plain.soft_cap,
            "logit_scale": plain.logit_scale,
            "row_scales": row_scales,
            "shortlist": shortlist,
        }

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        said = exit_head(hidden_states, self.plain.weight, **self._options)
        if self.plain.all_gather is not None:
            # In one message: token numbers are exact in float64.
            packed = torch.stack([values.double() for values in said]).unsqueeze(0)
            token, *values = self.plain.all_gather(packed, 0).unbind(1)
            said = merge(HeadTokens(token.long(), *(value.float() for value in values)))
        return said.token, said.probability

    def agree(self, hidden_states: torch.Tensor, expected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.plain.all_gather is not None:
            return super().agree(hidden_states, expected)
        return shadow_agree(hidden_states, self.plain.weight, expected, **self._options)

    def __str__(self) -> str:
        shortlist, scales = self._options["shortlist"], self._options["row_scales"]
        listed = "" if shortlist is None else f" over {len(shortlist)} tokens"
        return f"fused LM head{'' if scales is None else ' in FP8'}{listed}"


class RenamedHead(Head):
    """A head over copies of some tokens' rows, which knows them by their places."""

    def __init__(
        self,
        head: Head,
        # [copies] int64: whose rows they are
        tokens: torch.Tensor,
    ) -> None:
        self._head = head
        self._tokens = tokens

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        place, probability = self._head(hidden_states)
        return self._tokens[place], probability

    def __str__(self) -> str:
        return f"{self._head} over {len(self._tokens)} tokens"


def quantise(
    # [vocabulary, hidden size], and which of its rows, [copies] int64; None: all
    weight: torch.Tensor,
    tokens: torch.Tensor | None,
    # [copies, hidden size] float8_e4m3fn; and [copies] float32: what to multiply each row by
    rows: torch.Tensor,
    scales: torch.Tensor,
) -> None:
    """Write rows of `weight` into `rows`, each scaled to the range of FP8."""
    largest = torch.finfo(rows.dtype).max
    # A part at a time, as it is float32 in between.
    for begin in range(0, len(rows), AT_ONCE):
        part = slice(begin, begin + AT_ONCE)
        wide = (weight[part] if tokens is None else weight[tokens[part]]).float()
        scales[part] = wide.abs().amax(1).clamp_min(1e-12) / largest
        rows[part] = wide / scales[part].unsqueeze(1)


AT_ONCE = 512
"""Rows that are quantised together, also while serving: in float32 some MiB."""
