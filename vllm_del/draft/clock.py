"""Time: what rounds take beside their forward passes, how often a plan is worth making, what the host knows when."""

import math
import time
from collections import deque
from statistics import median
from typing import Any

import torch

from vllm_del.policy.cost import CostTables

PLANNING_SHARE, IDLE_SHARE = 0.05, 0.005
"""Of the time of verification, what observing and planning may take: in rounds that draft, and in those that do not.

On a large model they take less each round.
"""


class Stopwatch:
    """How much longer than its forward pass the time between two drafting rounds is: the median of the last ones."""

    def __init__(self, costs: CostTables) -> None:
        self._costs = costs
        self._seen: deque[float] = deque(maxlen=31)
        self._started, self._slots = 0.0, torch.empty(0, dtype=torch.int64)

    def start(self, slots: torch.Tensor) -> None:
        """Drafting has ended."""
        self._started, self._slots = time.perf_counter(), slots

    def overhead(self, slots: torch.Tensor, num_tokens: int, contexts: float) -> float:
        """Seconds, after a verification of `num_tokens` of sequences whose context lengths add up to `contexts`.

        Before other sequences there may have been a pause.
        """
        if self._slots is slots:
            elapsed = time.perf_counter() - self._started
            self._seen.append(max(0.0, elapsed - self._costs.verify_seconds(num_tokens, contexts)))
        return median(self._seen) if self._seen else 0.0


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
