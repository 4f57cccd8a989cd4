"""Counts what a policy drafted and what came of it, for those who watch the server.

A round costs no tensor operation; what is counted is added up every few rounds.
"""

import time
from dataclasses import dataclass

import torch

from vllm_del.draft.outcome import Outcome

FLUSH_ROUNDS = 8
FLUSH_SECONDS = 0.1
"""Added up after so many rounds or so much time, whichever is first."""


@dataclass
class Counts:
    """What happened since the last ones. Of rounds that might have drafted; a trial is a draft whose fate is known."""

    # by exit: tokens drafted; of these those accepted, those tried, and the acceptances expected of the tried ones
    drafted: list[float]
    accepted: list[float]
    tried: list[float]
    expected: list[float]
    # by draft length, 0 included: rounds of a sequence
    lengths: list[float]
    # seconds of whole rounds, as expected of one that drafted what they did, and by the clock
    planned_seconds: float
    measured_seconds: float


class Tally:
    """Device tensors in, `Counts` out."""

    def __init__(self, num_exits: int, max_length: int, device: torch.device) -> None:
        self._num_exits = num_exits
        self._max_length = max_length
        self._device = device
        self._rounds: list[Outcome] = []
        self._undrafted = 0
        self._seconds = (0.0, 0.0)
        self._begun = time.perf_counter()

    def add(self, outcome: Outcome) -> None:
        """What came of a round."""
        self._rounds.append(outcome)

    def add_undrafted(self, rows: int) -> None:
        """Of a round without drafts nothing comes: so many rows might have drafted."""
        self._undrafted += rows

    def add_time(self, planned: float, measured: float) -> None:
        """Seconds of a round from its begin to the next one's: as expected, and by the clock."""
        self._seconds = self._seconds[0] + planned, self._seconds[1] + measured

    @property
    def is_due(self) -> bool:
        """Whether it is time to add up."""
        late = time.perf_counter() - self._begun > FLUSH_SECONDS
        return bool(self._rounds or self._undrafted) and (late or len(self._rounds) >= FLUSH_ROUNDS)

    def flush(self) -> torch.Tensor:
        """All that was added, summed: a vector for `counts`. Begins anew."""
        by_exit = torch.zeros(4, self._num_exits, dtype=torch.float64, device=self._device)
        lengths = torch.zeros(self._max_length + 1, dtype=torch.float64, device=self._device)
        if self._rounds:
            self._sum_up(by_exit, lengths)
        if self._undrafted:
            lengths[0] += self._undrafted
        times = torch.stack([lengths.new_full((), seconds) for seconds in self._seconds])
        self._rounds, self._undrafted, self._seconds = [], 0, (0.0, 0.0)
        self._begun = time.perf_counter()
        return torch.cat((by_exit.flatten(), lengths, times))

    def _sum_up(
        self,
        # [4, exits], [1 + largest draft length] float64
        by_exit: torch.Tensor,
        lengths: torch.Tensor,
    ) -> None:
        exit = torch.cat([of.drafted.exit for of in self._rounds])
        length = torch.cat([of.drafted.length for of in self._rounds])
        expected = torch.cat([of.drafted.expected for of in self._rounds])
        allowed = torch.cat([of.drafted.allowed & of.sampled for of in self._rounds]).double()
        drafted = torch.minimum(length, torch.cat([of.verified for of in self._rounds]))
        accepted = torch.minimum(drafted, torch.cat([of.accepted for of in self._rounds]))
        tried = accepted + (accepted < drafted)
        counted = torch.stack((drafted, accepted, tried, expected * tried)).double()
        by_exit.index_add_(1, exit, counted)
        lengths.index_add_(0, drafted, allowed)

    def counts(self, values: list[float]) -> Counts:
        """What a vector of `flush` says."""
        parts = []
        for size in (*[self._num_exits] * 4, self._max_length + 1):
            parts.append(values[:size])
            values = values[size:]
        drafted, accepted, tried, expected, lengths = parts
        planned, measured = values
        return Counts(drafted, accepted, tried, expected, lengths, planned, measured)
