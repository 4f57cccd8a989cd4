"""When a round ends: a draft step takes nearly as long for one row as for all, so few rows may not be worth another.

DEL ends a sequence's draft where it is in doubt of its last token. In a batch such rows leave, one after another, and
those that are left pay for the whole step. What they can still be expected to bring is weighed against it.
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Together:
    """What one more step of a round is expected to bring, and what it has to, on the host.

    In numpy, as it is asked in every step: operations on a few numbers take less than half of torch's time.
    """

    # [rows] float each: how likely a draft is accepted; the confidence below which a token is in doubt, NaN for none;
    # and of these tokens how likely they are accepted, `offset + slope * confidence`
    acceptance: np.ndarray
    doubt_below: np.ndarray
    offset: np.ndarray
    slope: np.ndarray
    # [rows] float, and one number: tokens that are worth the time of one more draft of the row, and what a step takes
    # however many rows are in it
    itself: np.ndarray
    shared: float
    # [rows] float: how likely all drafts of the row so far are accepted
    survived: np.ndarray

    def begin(self, rows: int) -> "Together":
        """The same of the first rows, for another round."""
        return self._of(slice(rows), np.ones(rows))

    def after(
        self,
        # [rows] float32, on the host
        confidence: torch.Tensor,
    ) -> None:
        """Every row has drafted a token of such confidence."""
        said, chance = confidence.numpy(), self.acceptance
        doubtful = said < self.doubt_below
        if doubtful.any():
            of_doubtful = np.minimum(np.maximum(self.offset + self.slope * said, 0), 1)
            chance = np.where(doubtful, of_doubtful, chance)
        self.survived *= chance

    def pays(
        self,
        # [rows] bool, on the host: rows that would go on
        live: torch.Tensor,
    ) -> bool:
        """Whether one more step is worth its time."""
        return bool(np.dot(self.survived * self.acceptance - self.itself, live.numpy()) >= self.shared)

    def take(
        self,
        # [taken] int64, on the host
        index: torch.Tensor,
    ) -> "Together":
        """The same of some of the rows."""
        rows = index.numpy()
        return self._of(rows, self.survived[rows])

    def _of(self, rows: slice | np.ndarray, survived: np.ndarray) -> "Together":
        return Together(
            self.acceptance[rows],
            self.doubt_below[rows],
            self.offset[rows],
            self.slope[rows],
            self.itself[rows],
            self.shared,
            survived,
        )
