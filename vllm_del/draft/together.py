"""When a round ends: a draft step takes nearly as long for one row as for all, so few rows may not be worth another.

DEL ends a sequence's draft where it is in doubt of its last token. In a batch such rows leave, one after another, and
those that are left pay for the whole step. What they can still be expected to bring is weighed against it.
"""

from dataclasses import dataclass, replace

import torch


@dataclass
class Together:
    """What one more step of a round is expected to bring, and what it has to: tensors on the model's device."""

    # [rows] float each: how likely a draft is accepted; the confidence below which a token is in doubt, NaN for none;
    # and of these tokens how likely they are accepted, `offset + slope * confidence`
    acceptance: torch.Tensor
    doubt_below: torch.Tensor
    offset: torch.Tensor
    slope: torch.Tensor
    # [rows] float, and one number: tokens that are worth the time of one more draft of the row, and what a step takes
    # however many rows are in it
    itself: torch.Tensor
    shared: torch.Tensor
    # [rows] float: how likely all drafts of the row so far are accepted
    survived: torch.Tensor

    def after(
        self,
        # [rows] float32
        confidence: torch.Tensor,
    ) -> "Together":
        """The same once every row has drafted a token of such confidence."""
        of_doubtful = (self.offset + self.slope * confidence).clamp(0, 1)
        chance = of_doubtful.where(confidence < self.doubt_below, self.acceptance)
        return replace(self, survived=self.survived * chance)

    def pays(
        self,
        # [rows] bool: rows that would go on
        live: torch.Tensor,
    ) -> bool:
        """Whether one more step is worth its time; the host waits for it."""
        return bool(((self.survived * self.acceptance - self.itself) * live).sum() >= self.shared)

    def take(
        self,
        # [taken] int64
        index: torch.Tensor,
    ) -> "Together":
        """The same of some of the rows."""
        return Together(
            self.acceptance[index],
            self.doubt_below[index],
            self.offset[index],
            self.slope[index],
            self.itself[index],
            self.shared,
            self.survived[index],
        )
