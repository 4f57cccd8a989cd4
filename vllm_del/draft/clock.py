"""Time: what rounds take beside their forward passes, how often a plan is worth making, what the host knows when."""

import math
import time
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from vllm_del.draft.loop import Launched
from vllm_del.policy.cost import Correction, CostTables

ROUNDS, UNMOVED = 31, 4
"""So many rounds correct the tables; so many that were as in the tables are put before the first ones."""

PLANNING_SHARE = 0.05
"""Of the time of verification, what observing and planning may take. On a large model they take less each round."""


class Stopwatch:
    """Holds rounds against the tables of costs, by the host's clock.

    A machine has other things to do at another time, and what a step costs beside its kernels is in no table: where the
    host sees what the device does, the last rounds correct them.
    """

    def __init__(self, costs: CostTables, depths: Sequence[int], learns: bool) -> None:
        self._costs = costs
        self._depths = depths
        self.learns = learns
        # Of the last rounds: drafting by the clock over the tables; the rest by the clock, less and over the tables.
        self._drafting = deque([1.0] * UNMOVED, maxlen=ROUNDS)
        self._beside = deque([0.0] * UNMOVED, maxlen=ROUNDS)
        self._verifying = deque([1.0] * UNMOVED, maxlen=ROUNDS)
        # Of this round: when it began, of which sequences it is, and its drafting by the clock and by the tables
        self._begun, self._slots = 0.0, torch.empty(0, dtype=torch.int64)
        self._drafted, self._tabled = 0.0, 0.0
        self._contexts = 0.0
        self._correction = Correction()

    def correction(self) -> Correction:
        """By the median of the last rounds; of verification, what is beyond the table is beside it."""
        if self.learns:
            beside, verifying = median(self._beside), median(self._verifying)
            self._correction = Correction(median(self._drafting), min(1.0, verifying), max(0.0, beside))
        return self._correction

    def drafted(self, slots: torch.Tensor, launched: Launched) -> None:
        """The drafts of these sequences are there."""
        tabled = sum(
            self._costs.draft_seconds(rows, self._depths[exit], self._contexts * rows / len(slots))
            for rows, exit in launched.steps
        )
        if tabled:
            self._drafting.append(launched.seconds / tabled)
        self._slots, self._drafted, self._tabled = slots, launched.seconds, tabled

    def verified(
        self, slots: torch.Tensor, num_tokens: int, contexts: float, only_decodes: bool
    ) -> tuple[float, float] | None:
        """A verification of `num_tokens` ends a round, and begins another one.

        Seconds that the round was to take and took; None where it was of other sequences, as there may have been a
        pause, or had a prompt in it.
        """
        now, begun = time.perf_counter(), self._begun
        same = self._slots is slots and only_decodes
        self._begun, self._contexts, self._slots = now, contexts, torch.empty(0, dtype=torch.int64)
        if not same:
            return None
        tabled = self._costs.verify_seconds(num_tokens, contexts)
        rest = now - begun - self._drafted
        self._beside.append(rest - tabled)
        self._verifying.append(rest / tabled)
        of = self._correction
        return of.draft * self._tabled + of.verify * tabled + of.overhead, now - begun


class Pace:
    """How many rounds a plan serves, where making one takes long beside a round; of costs that all ranks agree on."""

    def __init__(self, planning_seconds: float, costs: CostTables) -> None:
        self._seconds = planning_seconds
        self._costs = costs

    def rounds(self, num_rows: int) -> int:
        """For so many sequences."""
        affordable = PLANNING_SHARE * self._costs.verify_seconds(num_rows)
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
