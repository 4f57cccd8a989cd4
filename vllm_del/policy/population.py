"""All sequences together: what to expect of one of which little is known, and how much its own counts are to say.

Where sequences are alike, one that was lucky so far is best taken for an average one; where they differ, it is best
taken at its word. Which of the two holds is seen: of several strengths of the common mean, those that foretold the last
rounds best decide (credibility theory, as Buehlmann has it, with a strength found by prediction).
"""

import torch

MEMORY = 0.995
"""What is left of a count after a round. The memory is some 200 rounds: ten times that of a sequence."""

STRENGTHS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
"""How many observations of its own the common mean may be worth to a sequence."""

FIRST = 16.0
"""What it is worth until something is known: the further a strength is from it, by factors of two, the more nats of
loss it begins with."""

SURE = 1e-3
"""No expectation is nearer to 0 or 1 when it is judged: one surprise must not decide for good."""


class Population:
    """Counts of matches and mismatches of all sequences, and how well their mean foretold each one's; on the device."""

    def __init__(self, num_exits: int, device: torch.device) -> None:
        # [exits, 2]: of matches, of mismatches. Even odds until something has been seen.
        self.counts = torch.full((num_exits, 2), 0.5, dtype=torch.float64, device=device)
        # [strengths, 1, 1]
        self._strengths = torch.tensor(STRENGTHS, dtype=torch.float64, device=device).view(-1, 1, 1)
        # [strengths]: the logarithmic loss of what each one foretold
        self._loss = (self._strengths.flatten() / FIRST).log2().abs()
        # scalar: how many observations the common mean is worth
        self.strength = self._likely()

    def fade(
        self,
        # [exits] float64: what is left of what was seen of each
        kept: torch.Tensor,
    ) -> None:
        """Forget a part of what was seen: what is left is even odds."""
        self.counts.sub_(0.5).mul_(kept.unsqueeze(-1)).add_(0.5)

    def observe(
        self,
        # [rounds, rows, exits, 2] float64: matches and mismatches
        seen: torch.Tensor,
        # [rows, exits, 2] float64: each sequence's own counts before
        before: torch.Tensor,
    ) -> None:
        """Learn from rounds, the last one last; `before` is what they were planned by."""
        matches, total = self._blend(before, self._strengths)
        expected = (matches / total).clamp(SURE, 1 - SURE)
        logs = torch.stack((expected.log(), (1 - expected).log()), -1)
        in_round = seen.sum(1)
        rounds = (in_round.sum((1, 2)) > 0).sum()
        self._loss.mul_(MEMORY**rounds).sub_((logs * seen.sum(0)).sum((1, 2, 3)))
        self.strength = self._likely()
        kept, weight = fading(in_round.sum(-1) > 0, MEMORY)
        self.counts.mul_(kept.unsqueeze(-1)).add_((in_round * weight.unsqueeze(-1)).sum(0))

    def estimate(
        self,
        # [rows, exits, 2] float64
        counts: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A sequence's own matches, with the common mean for as many as it is worth, and the number of both."""
        return self._blend(counts, self.strength)

    def _likely(self) -> torch.Tensor:
        """The geometric mean of the strengths, by how likely each one made what was seen."""
        return (torch.softmax(-self._loss, 0) @ self._strengths.flatten().log()).exp()

    def _blend(self, counts: torch.Tensor, strength: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = self.counts.sum(-1)
        # The mean of an exit that was hardly asked is worth no more than what was seen of it.
        worth = torch.minimum(seen, strength)
        return counts[..., 0] + worth * self.counts[:, 0] / seen, counts.sum(-1) + worth


def fading(
    # [rounds, ...] bool: whether anything was scored in a round
    scored: torch.Tensor,
    memory: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is left of what was before these rounds, [...], and of each of them, [rounds, ...]: float64.

    Where nothing was scored nothing fades.
    """
    since = scored.flip(0).cumsum(0).flip(0)
    faded = memory ** since.double()
    # A round does not fade by itself.
    return faded[0], faded / memory
