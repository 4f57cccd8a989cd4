"""Acceptance statistics: how often each exit's token is the one the target takes, by sequence (arXiv 2504.05598).

After a verification exits are read out at the positions it kept, and each one's most probable token, the shadow
token, is compared with the target's. A match counts for the exit, a mismatch against it; old counts fade.

Rows live in slots, as vLLM's persistent batch does. All of it stays on the model's device, and nothing waits for it.
"""

import torch

from vllm_del.policy.population import Population, fading

DECAY = 0.95
"""omega of the paper: what is left of a count after a round. The memory is some 20 rounds."""

ENOUGH = 8.0
"""Observations below which nothing is read from their confidence but its means."""


class AcceptanceStatistics:
    """Decayed counts of matches and mismatches and sums of confidence: by slot, exit and outcome.

    In float64: small tensors, and choices between nearly equal exits that do not hang on rounding.
    """

    def __init__(self, num_slots: int, num_exits: int, device: torch.device, decay: float = DECAY) -> None:
        self.decay = decay
        # [slots, exits, 2]: of matches, of mismatches
        self._counts = torch.zeros(num_slots, num_exits, 2, dtype=torch.float64, device=device)
        self._confidence = torch.zeros_like(self._counts)
        # [slots, exits]: of the squares of confidence
        self._squares = torch.zeros(num_slots, num_exits, dtype=torch.float64, device=device)
        self.population = Population(num_exits, device)

    def reset(
        self,
        # [rows] int64
        slots: torch.Tensor,
    ) -> None:
        """Forget these slots: other sequences are about to use them."""
        self._counts.index_fill_(0, slots, 0)
        self._confidence.index_fill_(0, slots, 0)
        self._squares.index_fill_(0, slots, 0)

    def fade(
        self,
        # [exits] bool
        exits: torch.Tensor,
    ) -> None:
        """Half of what was seen of these exits, which are not asked, is forgotten: of other texts it would be wrong,
        and with it what is expected of shallower exits."""
        kept = torch.where(exits, 0.5, 1.0).double()
        self._counts.mul_(kept.unsqueeze(-1))
        self._confidence.mul_(kept.unsqueeze(-1))
        self._squares.mul_(kept)
        self.population.fade(kept)

    def observe(
        self,
        # [rows] int64, no slot twice
        slots: torch.Tensor,
        # [rounds, rows, positions, exits] bool, the last round last
        matched: torch.Tensor,
        # [rounds, rows, positions, exits] float: the probability of the shadow token; anything where not scored
        confidence: torch.Tensor,
        # [rounds, rows, positions, exits] bool: which were scored, of the positions that count
        scored: torch.Tensor,
    ) -> None:
        """Add rounds, and let those before them fade.

        Positions past a sequence's first rejected draft do not count (`kept_positions`): they follow a text that the
        target did not take. An exit of which nothing was scored keeps what it has: where not every exit is scored in
        every round, a fading that went by rounds would leave the rarely scored ones without a memory.
        """
        outcome = torch.stack((scored & matched, scored & ~matched), dim=-1)
        # Selected, not multiplied: what was not scored may hold anything, NaN included.
        seen = torch.where(scored, confidence, 0).to(self._counts.dtype)
        # [rounds, rows, exits, 2] twice, and [rounds, rows, exits]
        counts, sums = outcome.sum(2), torch.where(outcome, seen.unsqueeze(-1), 0).sum(2)
        in_round = scored.any(2)
        kept, weight = fading(in_round, self.decay)
        before = self._counts[slots]
        self.population.observe(counts.double(), before)
        self._counts[slots] = before * kept.unsqueeze(-1) + (counts * weight.unsqueeze(-1)).sum(0)
        self._confidence[slots] = self._confidence[slots] * kept.unsqueeze(-1) + (sums * weight.unsqueeze(-1)).sum(0)
        self._squares[slots] = self._squares[slots] * kept + (seen.square().sum(2) * weight).sum(0)

    def take_totals(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts and sums of confidence over all slots, [exits, 2] float64 each, matches first; all slots are reset."""
        totals = self._counts.sum(0), self._confidence.sum(0)
        for sums in (self._counts, self._confidence, self._squares):
            sums.zero_()
        return totals

    def acceptance(
        self,
        # [rows] int64
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """The estimated acceptance rate of each exit, [rows, exits] float64; NaN where nothing was scored."""
        counts = self._counts[slots]
        return counts[..., 0] / counts.sum(-1)

    def estimate(
        self,
        # [rows] int64
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """The acceptance rate of each exit as the server knows it, [rows, exits] float64: never NaN.

        A sequence's own counts, and the mean over all sequences for as much as it is worth (`Population`). Then as
        exits go: a deeper one agrees with the target no less, and what says otherwise is noise (isotonic regression, by
        the counts).
        """
        return rising(*self.population.estimate(self._counts[slots]))

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

    def by_confidence(
        self,
        # [rows] int64
        slots: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How likely a token is accepted by its confidence: offset and slope of a straight line, [rows, exits] float64.

        Least squares through what was seen. NaN where higher confidence does not mean better chances, or where little
        was seen.
        """
        counts, sums = self._counts[slots], self._confidence[slots]
        total = counts.sum(-1)
        mean, rate = sums.sum(-1) / total, counts[..., 0] / total
        variance = self._squares[slots] / total - mean.square()
        covariance = sums[..., 0] / total - rate * mean
        slope = (covariance / variance).where((covariance > 0) & (total >= ENOUGH), torch.nan)
        return rate - slope * mean, slope


def rising(
    # [rows, exits] float each: sums of what was seen, and how often
    sums: torch.Tensor,
    counts: torch.Tensor,
) -> torch.Tensor:
    """The means, as near as can be to what was seen but nowhere falling from an exit to the next, [rows, exits].

    Isotonic regression by its max-min formula: the largest, of all runs of exits that begin here or before, of the
    smallest mean of a run that goes on to here or further.
    """
    up_to, seen = sums.cumsum(-1), counts.cumsum(-1)
    # [rows, first, last]: the mean of a run
    mean = (up_to.unsqueeze(1) - (up_to - sums).unsqueeze(2)) / (seen.unsqueeze(1) - (seen - counts).unsqueeze(2))
    smallest = mean.flip(2).cummin(2).values.flip(2)
    begun = torch.ones_like(mean[0], dtype=torch.bool).triu()
    return smallest.masked_fill(~begun, -torch.inf).amax(1)


def kept_positions(
    # [rows] int: drafts the verification accepted
    num_accepted: torch.Tensor,
    num_positions: int,
) -> torch.Tensor:
    """Which positions of a round count, [rows, positions] bool: the last token's and each accepted draft's."""
    positions = torch.arange(num_positions, device=num_accepted.device)
    return positions <= num_accepted.unsqueeze(-1)
