"""Time: how far rounds are from the tables of costs, how often a plan is worth making, what the host knows when."""

import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from vllm_del.draft.loop import Launched
from vllm_del.policy.cost import Correction, CostTables

WATCHED, AGAIN = 12, 64
"""Rounds without drafts before any, and one after so many with: what they take cannot be told from rounds with drafts.

It decides whether drafting pays at all, and a machine changes.
"""

GAIN, STRIDE = 0.1, 0.5
"""How much of what a round differs corrects the tables, and the most that it counts as, of the factor."""

FORGETTING = 0.001
"""What of a correction of drafts is forgotten in a round without: after some hundreds drafts get another chance."""

PLANNING_SHARE, IDLE_SHARE = 0.03, 0.006
"""Of the time of verification, what observing and planning may take: in rounds that draft, and in those that do not.

On a large model they take less each round.
"""


class Stopwatch:
    """Holds rounds against the tables of costs, by the host's clock.

    A machine has other things to do at another time, and what a round takes beside its kernels is in no table: where
    the host sees what the device does, the rounds correct the tables.
    """

    def __init__(self, costs: CostTables, depths: Sequence[int], learns: bool) -> None:
        self._costs = costs
        self._depths = depths
        self._learns = learns
        # Rounds so far, those without drafts that were timed, and those with since the last one without
        self._rounds, self._watched, self._in_a_row = 0, 0, 0
        self.correction = Correction()
        # Of this round: when it began, of which sequences it is, its draft steps by the clock and by the tables
        self._begun, self._slots = 0.0, torch.empty(0, dtype=torch.int64)
        self._drafted, self._tabled = 0.0, 0.0
        # Of what was verified last
        self._contexts, self._only_decodes = 0.0, False

    @property
    def watches(self) -> bool:
        """Whether this round had better draft nothing."""
        return self._learns and (self._rounds < WATCHED or self._in_a_row >= AGAIN)

    def drafted(self, slots: torch.Tensor, launched: Launched) -> None:
        """The drafts of these sequences are there."""
        self._rounds += 1
        tabled = sum(
            self._costs.draft_seconds(rows, self._depths[exit], self._contexts * rows / len(slots))
            for rows, exit in launched.steps
        )
        self._slots, self._drafted, self._tabled = slots, launched.seconds, tabled
        self._in_a_row = self._in_a_row + 1 if launched.steps else 0

    def verified(
        self, slots: torch.Tensor, num_tokens: int, contexts: float, only_decodes: bool
    ) -> tuple[float, float] | None:
        """A verification of `num_tokens` ends a round, and begins another one.

        Seconds that the round was to take and took; None where it was of other sequences, as there may have been a
        pause, or had a prompt in it.
        """
        now, begun, before = time.perf_counter(), self._begun, self._only_decodes
        same = self._slots is slots and only_decodes
        self._begun, self._slots = now, torch.empty(0, dtype=torch.int64)
        self._contexts, self._only_decodes = contexts, only_decodes
        if not same or not before:
            return None
        of = self.correction
        alone = self._costs.verify_seconds(len(slots), contexts)
        drafts = self._costs.drafts_seconds(len(slots), num_tokens, contexts)
        expected = of.draft * self._tabled + of.verify * alone + of.drafts * drafts
        if self._tabled:
            expected += of.drafting * alone
        if self._learns:
            self._learn(alone, drafts, now - begun - self._drafted)
        return expected, now - begun

    def _learn(self, alone: float, drafts: float, rest: float) -> None:
        """From a round of which all but the draft steps took `rest`."""
        of = self.correction
        if self._tabled:
            of.draft = _moved(of.draft, self._drafted / self._tabled, GAIN)
            # Beyond the table it is something else; where it is less, the table is too high.
            of_drafts = rest - of.verify * alone
            if drafts > 0:
                of.drafts = _moved(of.drafts, min(1.0, of_drafts / drafts), GAIN)
            beyond = max(0.0, of_drafts - drafts) / alone
            of.drafting += GAIN * (min(beyond, of.drafting + STRIDE) - of.drafting)
            return
        # The first ones count alike, and later ones are few.
        self._watched += 1
        of.verify = _moved(of.verify, rest / alone, max(2 * GAIN, 1 / self._watched))
        # Where nothing is drafted nothing is learnt of drafts: what kept them away is forgotten, slowly.
        of.draft += FORGETTING * (1 - of.draft)
        of.drafts += FORGETTING * (1 - of.drafts)
        of.drafting -= FORGETTING * of.drafting


def _moved(factor: float, seen: float, gain: float) -> float:
    """Towards what was seen; no further for an outlier than for what differs by `STRIDE`."""
    return factor + gain * (min(max(seen, factor * (1 - STRIDE)), factor * (1 + STRIDE)) - factor)


class Pace:
    """How many rounds a plan serves, where making one takes long beside a round; of costs that all ranks agree on."""

    def __init__(self, planning_seconds: float, costs: CostTables) -> None:
        self._seconds = planning_seconds
        self._costs = costs

    def rounds(self, num_rows: int, drafts: bool) -> int:
        """For so many sequences, by a plan with any drafts or by one without."""
        affordable = (PLANNING_SHARE if drafts else IDLE_SHARE) * self._costs.verify_seconds(num_rows)
        return max(1, math.ceil(self._seconds / affordable)) if affordable > 0 else 1


class Late:
    """Values of the device as the host knows them without waiting: two rounds late.

    Two, as the host runs up to one round ahead of the device; so what it reads has long arrived, and it is the same
    value on every rank, which all have to launch as many steps.
    """

    def __init__(self, first: Any) -> None:
        self._copies: deque[tuple[torch.Tensor, torch.cuda.Event | None, Any]] = deque()
        self._first = first

    def exchange(self, values: torch.Tensor, note: Any = None) -> tuple[Any, Any]:
        """Take this round's values, and a note on them; give those of two rounds ago, as a list, and their note."""
        event = None
        copy = values.to("cpu", non_blocking=True, copy=True)
        if values.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self._copies.append((copy, event, note))
        if len(self._copies) <= 2:
            return self._first, None
        copy, event, note = self._copies.popleft()
        if event is not None:
            event.synchronize()
        return copy.tolist(), note
