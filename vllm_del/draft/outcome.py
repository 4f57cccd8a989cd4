"""What was drafted for each sequence and what came of it, until the policy learns from it.

While the batch stays the same its rows do, and nothing is copied; only what another batch has to find goes into slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from vllm_del.policy.acceptance import kept_positions


@dataclass
class Drafted:
    """What a round drafted: tensors on the model's device, by row of the batch."""

    # [rows] int64: at which exit (an index), and how many tokens
    exit: torch.Tensor
    length: torch.Tensor
    # [rows] float64: the acceptance rate that was expected of them
    expected: torch.Tensor
    # [rows] bool: whether there might have been any
    allowed: torch.Tensor
    # [rows, largest draft length] float: of each one
    confidence: torch.Tensor


@dataclass
class Outcome:
    """What came of it: the same rows."""

    drafted: Drafted
    # [rows] int64: how many of the drafts were verified, and of these were accepted
    verified: torch.Tensor
    accepted: torch.Tensor
    # [rows] bool: rows past their prompt
    sampled: torch.Tensor


class LastDrafts:
    """What was drafted last for each sequence, in whatever row it is by now."""

    def __init__(self, num_slots: int, max_length: int, device: torch.device) -> None:
        # [slots, 4 + largest draft length]: the fields of `Drafted` side by side
        self._by_slot = torch.zeros(num_slots, 4 + max_length, dtype=torch.float64, device=device)
        self._slots: torch.Tensor | None = None
        self._drafted: Drafted

    def keep(
        self,
        # [rows] int64
        slots: torch.Tensor,
        drafted: Drafted,
    ) -> None:
        """These sequences have drafted. Others keep what they had."""
        if slots is not self._slots:
            self._put_away()
        self._slots, self._drafted = slots, drafted

    def forget(self, slots: torch.Tensor) -> None:
        """Other sequences are in these slots now; they have drafted nothing."""
        self._put_away()
        self._by_slot.index_fill_(0, slots, 0)

    def of(self, slots: torch.Tensor) -> Drafted:
        """By the rows of `slots`."""
        if slots is self._slots:
            return self._drafted
        self._put_away()
        rows = self._by_slot[slots]
        exit, length, expected, allowed = rows[:, :4].unbind(1)
        return Drafted(exit.long(), length.long(), expected, allowed > 0, rows[:, 4:])

    def _put_away(self) -> None:
        if self._slots is not None:
            of = self._drafted
            fields = [values.double() for values in (of.exit, of.length, of.expected, of.allowed)]
            self._by_slot[self._slots] = torch.cat((torch.stack(fields, 1), of.confidence.double()), 1)
        self._slots = None


def matches(
    # of the same sequences, oldest first
    outcomes: Sequence[Outcome],
    num_exits: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What verification says of the exits that drafted: as `AcceptanceStatistics.observe` takes it, and what counts.

    Matched, confidence and scored are [rounds, rows, 1 + largest draft length, exits]; the last is the positions that
    verification kept, [rounds, rows, 1 + largest draft length].
    """
    exit = torch.stack([of.drafted.exit for of in outcomes])
    length = torch.stack([torch.minimum(of.verified, of.drafted.length) for of in outcomes]).unsqueeze(-1)
    accepted = torch.stack([of.accepted for of in outcomes])
    sampled = torch.stack([of.sampled for of in outcomes]).unsqueeze(-1)
    confidence = pad(torch.stack([of.drafted.confidence for of in outcomes]), (0, 1))
    kept = kept_positions(accepted, confidence.shape[-1]) & sampled
    steps = torch.arange(confidence.shape[-1], device=kept.device)
    its_own = exit[..., None, None] == torch.arange(num_exits, device=kept.device)
    scored = (kept & (steps < length)).unsqueeze(-1) & its_own
    matched = scored & (steps < accepted.unsqueeze(-1)).unsqueeze(-1)
    return matched, confidence.unsqueeze(-1).expand(scored.shape).clone(), scored, kept
