"""When a round ends: a draft step takes nearly as long for one row as for all, so few rows may not be worth another.

DEL ends a sequence's draft where it is in doubt of its last token. In a batch such rows leave, one after another, and
those that are left pay for the whole step. What they can still be expected to bring is weighed against it.
"""

from dataclasses import dataclass

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

    def chance(
        self,
        # [rows] float32
        confidence: torch.Tensor,
    ) -> torch.Tensor:
        """How likely tokens of such confidence are accepted if those before them are, [rows] float."""
        of_doubtful = (self.offset + self.slope * confidence).clamp(0, 1)
        return of_doubtful.where(confidence < self.doubt_below, self.acceptance)

    def pays(
        self,
        # [rows] float: how likely all drafts of a row so far are accepted; [rows] bool: rows that would go on
        survived: torch.Tensor,
        live: torch.Tensor,
    ) -> bool:
        """Whether one more step is worth its time; the host waits for it."""
        return bool(((survived * self.acceptance - self.itself) * live).sum() >= self.shared)

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
        )
