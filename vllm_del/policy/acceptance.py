"""Acceptance statistics: how often each exit's token is the one the target takes, by sequence (arXiv 2504.05598).

After a verification the exits are read out at the positions it kept, and each one's most probable token, the shadow
token, is compared with the target's. A match counts for the exit, a mismatch against it; old counts fade.

Rows live in slots, as vLLM's persistent batch does. All of it stays on the model's device, and nothing waits for it.
"""

import torch

DECAY = 0.95
"""omega of the paper: what is left of a count after a round. The memory is some 20 rounds."""


class AcceptanceStatistics:
    """Decayed counts of matches and mismatches and sums of confidence: by slot, exit and outcome.

    In float64: small tensors, and choices between nearly equal exits that do not hang on rounding.
    """

    def __init__(self, num_slots: int, num_exits: int, device: torch.device, decay: float = DECAY) -> None:
        self.decay = decay
        # [slots, exits, 2]: of matches, of mismatches
        self._counts = torch.zeros(num_slots, num_exits, 2, dtype=torch.float64, device=device)
        self._confidence = torch.zeros_like(self._counts)

    def reset(
        self,
        # [rows] int64
        slots: torch.Tensor,
    ) -> None:
        """Forget these slots: other sequences are about to use them."""
        self._counts.index_fill_(0, slots, 0)
        self._confidence.index_fill_(0, slots, 0)

    def observe(
        self,
        # [rows] int64, no slot twice
        slots: torch.Tensor,
        # [rows, positions, exits] bool
        matched: torch.Tensor,
        # [rows, positions, exits] float: the probability of the shadow token; anything where not scored
        confidence: torch.Tensor,
        # [rows, positions, exits] bool: which were scored, of the positions that count
        scored: torch.Tensor,
    ) -> None:
        """Add a round, and let those before it fade.

        Positions past a sequence's first rejected draft do not count (`kept_positions`): they follow a text that the
        target did not take. A row of which nothing was scored fades as well.
        """
        outcome = torch.stack((scored & matched, scored & ~matched), dim=-1)
        # Selected, not multiplied: what was not scored may hold anything, NaN included.
        sums = torch.where(outcome, confidence.unsqueeze(-1), 0).sum(1, dtype=self._counts.dtype)
        self._counts[slots] = self._counts[slots] * self.decay + outcome.sum(1)
        self._confidence[slots] = self._confidence[slots] * self.decay + sums

    def acceptance(
        self,
        # [rows] int64
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """The estimated acceptance rate of each exit, [rows, exits] float64; NaN where nothing was scored."""
        counts = self._counts[slots]
        return counts[..., 0] / counts.sum(-1)

    def stop_below(
        self,
        # [rows] int64
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """The confidence below which a draft ends after its token, [rows, exits] float64 (the paper's tau).

        Midway between the mean confidence of matches and that of mismatches. NaN, below which nothing is, where one of
        the two has not been seen.
        """
        return (self._confidence[slots] / self._counts[slots]).mean(-1)


def kept_positions(
    # [rows] int: drafts the verification accepted
    num_accepted: torch.Tensor,
    num_positions: int,
) -> torch.Tensor:
    """Which positions of a round count, [rows, positions] bool: the last token's and each accepted draft's."""
    positions = torch.arange(num_positions, device=num_accepted.device)
    return positions <= num_accepted.unsqueeze(-1)
