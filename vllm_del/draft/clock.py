"""Time: how far rounds are from the tables of costs, how often a plan is worth making, what the host knows when."""

import math
import time
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from vllm_del.draft.loop import Launched
from vllm_del.policy.cost import Correction, CostTables

LAST, AS_TABLED = 31, 5
"""Of so many rounds the median corrects the tables; at first so many are as if they had been as the tables say, and
drafts as fast as verification."""

USUAL_FACTOR, USUAL_OVERHEAD, USUAL_STEP_OVERHEAD = 0.2, 0.001, 0.0005
"""How far verification and draft steps usually are from their tables, in proportion, and what a round and a step take
beside these, in seconds: so the milliseconds that a small model takes longer are mostly overhead, whatever the exit,
and those of a large one mostly in proportion.
"""

NOISE, LEAST_FACTOR = 0.05, 0.2
"""By what share of it a step's time varies from round to round; and the least that drafts may take, in proportion to
verification."""

RELEARN = 4
"""After so many rounds each the tables are corrected: medians of many rounds change slowly, and take their time."""

AGAIN = 8
"""Where nothing is drafted, every so many rounds count as one in which drafts were as fast as verification.

So what kept drafts away is forgotten after some hundred rounds: they get another chance.
"""

PLANNING_SHARE, IDLE_SHARE = 0.01, 0.0025
"""Of the time of verification, what observing and planning may take: in rounds that draft, and in those that do not.

On a large model they take less each round.
"""

EARLY_SHARE = 0.05
"""And no more than this where sequences are new, of which little is known, but for what `Pace` says: of a small model,
planning in each of their first rounds would take much of these. Meanwhile they go by what the last plan has for a
sequence of which nothing is known."""

MOST_ROUNDS = 32
"""No plan serves more rounds: it is of an acceptance that changes."""

OTHERS = 3
"""Of so many sequences that it was made for, a plan still serves if one has left and one come."""


class Stopwatch:
    """Holds rounds against the tables of costs, by the host's clock.

    A machine has other things to do at another time, and what a round takes beside its kernels is in no table: where
    the host sees what the device does, the rounds correct the tables.
    """

    def __init__(self, costs: CostTables, depths: Sequence[int], learns: bool) -> None:
        self._costs = costs
        self._depths = depths
        self.learns = learns
        self.forget()
        self._undrafted = self._rounds_seen = 0
        # Of this round: when it began, of which sequences it is, its draft steps, by the clock and by the tables
        self._begun, self._slots = 0.0, torch.empty(0, dtype=torch.int64)
        self._steps, self._drafted, self._tabled = 0, 0.0, 0.0
        # And what scoring shadow tokens took, and had taken in all: it has a budget of its own
        self._scoring, self._scored = 0.0, 0.0
        # Of what was verified last
        self._contexts, self._only_decodes = 0.0, False

    def forget(self) -> None:
        """Take the tables at their word again."""
        self._costs.correction = Correction()
        # Of the last rounds that drafted: what a draft step took and what the tables say of it; None counts as a round
        # in which drafts were as fast as verification
        self._draft_steps: deque[tuple[float, float] | None] = deque([None] * AS_TABLED, maxlen=LAST)
        # Of the last rounds: what the tables say of all else, and what it took beyond that
        self._tables: deque[float] = deque(maxlen=LAST)
        self._beyond = deque([0.0] * AS_TABLED, maxlen=LAST)

    def pause(self) -> None:
        """The next verification ends no round: something else comes between."""
        self._slots = torch.empty(0, dtype=torch.int64)

    def drafted(self, slots: torch.Tensor, launched: Launched, scored: float) -> None:
        """The drafts of these sequences are there. `scored` is what scoring has taken in all, seconds."""
        self._slots, self._steps, self._drafted = slots, len(launched.steps), launched.seconds
        self._scoring, self._scored = scored - self._scored, scored
        self._tabled = sum(
            self._costs.draft_seconds(rows, self._depths[exit], self._contexts * rows / len(slots))
            for rows, exit in launched.steps
        )

    def verified(
        self, slots: torch.Tensor, num_tokens: int, contexts: float, only_decodes: bool
    ) -> tuple[float, float] | None:
        """A verification of `num_tokens` ends a round, and begins another one.

        Seconds that the round was to take and took; None where it was of other sequences, as there may have been a
        pause, or had a prompt in it.
        """
        now, begun, before = time.perf_counter(), self._begun, self._only_decodes
        same = self._slots is slots and only_decodes
        self._begun = now
        self.pause()
        self._contexts, self._only_decodes = contexts, only_decodes
        if not same or not before:
            return None
        of, tabled = self._costs.correction, self._costs.round_seconds(len(slots), num_tokens, contexts)
        expected = of.draft * self._tabled + of.step * self._steps + of.verify * tabled + of.overhead
        if self.learns:
            self._learn(now - begun - self._drafted - self._scoring, tabled)
        return expected, now - begun

    def _learn(self, rest: float, tabled: float) -> None:
        """From a round of which all but draft steps and scoring took `rest` seconds."""
        self._tables.append(tabled)
        self._beyond.append(rest - tabled)
        self._undrafted = 0 if self._steps else self._undrafted + 1
        if self._steps:
            self._draft_steps.append((self._drafted / self._steps, self._tabled / self._steps))
        elif self._undrafted % AGAIN == 0:
            self._draft_steps.append(None)
        self._rounds_seen += 1
        if self._rounds_seen % RELEARN == 0:
            of = self._costs.correction
            excess, of.overhead = _shared_out(median(self._beyond), median(self._tables), USUAL_OVERHEAD)
            of.verify = 1 + excess
            self._learn_of_drafts()

    def _learn_of_drafts(self) -> None:
        # A machine that is slower is so in all it does: beyond that is what drafts take more than verification.
        of = self._costs.correction
        steps = [(took - of.verify * tabled, tabled) for took, tabled in filter(None, self._draft_steps)]
        if not steps:
            of.draft, of.step = of.verify, 0.0
            return
        as_verified = [0.0] * (len(self._draft_steps) - len(steps))
        beyond, table = median([more for more, _ in steps] + as_verified), median(tabled for _, tabled in steps)
        # A step takes some time for its layers, whatever a slope of noise says.
        least = (LEAST_FACTOR - 1) * of.verify
        excess, of.step = _shared_out(beyond, table, USUAL_STEP_OVERHEAD, _slope(steps, table), least)
        of.draft = of.verify + excess


def _shared_out(
    beyond: float,
    table: float,
    usual_overhead: float,
    slope: tuple[float, float] = (0.0, 0.0),
    least: float = -math.inf,
) -> tuple[float, float]:
    """Seconds beyond what is tabled, as a part of that, `least` or more, and an overhead, which is never negative.

    Least squares: of both in units of what is usual, and of what is known of the `slope`.
    """
    squares, products = slope
    of_overhead = 1 / usual_overhead**2
    excess = (products + of_overhead * beyond * table) / (squares + 1 / USUAL_FACTOR**2 + of_overhead * table**2)
    overhead = beyond - max(excess, least) * table
    return (max(excess, least), overhead) if overhead > 0 else (beyond / table, 0.0)


def _slope(steps: Sequence[tuple[float, float]], table: float) -> tuple[float, float]:
    """What short and long draft steps say of the slope of what is beyond their tables: two sums of least squares.

    `steps` are pairs of these, and `table` is what the tables mostly say. The medians of both halves count. Steps to
    one exit say next to nothing; those to several tell what goes by the layer from what each step takes.
    """
    half = len(steps) // 2
    if not half:
        return 0.0, 0.0
    ordered = sorted(steps, key=lambda step: step[1])
    (less, short), (more, long) = (
        (median(beyond for beyond, _ in part), median(tabled for _, tabled in part))
        for part in (ordered[:half], ordered[half:])
    )
    weight = half * (len(steps) - half) / len(steps) / (NOISE * table) ** 2
    return weight * (long - short) ** 2, weight * (long - short) * (more - less)


class Pace:
    """How many rounds a plan serves, where making one takes long beside a round.

    A batch of which more than a third has come or gone since is another one, which gets its own: at once if the last
    round drafted nothing, or the plan was of less than half or more than twice as many sequences, else as soon as
    `EARLY_SHARE` allows.
    """

    def __init__(self, planning_seconds: float, costs: CostTables, learns: bool) -> None:
        self._costs = costs
        self._learns = learns
        self.most = MOST_ROUNDS
        # As measured at first, and then of the last plans
        self._seconds = deque([planning_seconds] * AS_TABLED, maxlen=LAST)
        # Sequences in this round, and for how many rounds they have been there, on average
        self._rows, self._age = 0, 0.0
        # Of the last plan: for how many it was made, and of what age; and since then rounds, who came and left, and
        # what verification took by the tables, seconds
        self._planned_for, self._planned_at = 0, 0.0
        self._served = self._came = self._left = 0
        self._verified = 0.0

    def begin(self, num_rows: int, num_tokens: int, came: int = 0, left: int = 0) -> None:
        """A round begins with a verification of `num_tokens`, of so many sequences; some were not in the one before,
        and some of that one are gone."""
        self._came, self._left = self._came + came, self._left + left
        self._rows = num_rows
        self._served += 1
        self._verified += self._costs.verify_seconds(num_tokens)
        self._age = (self._age + 1) * (1 - came / num_rows)

    def is_due(self, drafts: bool, ahead: int = 0) -> bool:
        """Whether the last plan, with any drafts or without, no longer serves: in this round, or so many later ones of
        one token a row."""
        served, others = self._served + ahead, OTHERS * max(self._came, self._left) > self._planned_for
        fewer, more = sorted((self._rows, self._planned_for))
        if served >= self.most or (others and (not drafts or more > 2 * fewer)):
            return True
        verified = self._verified + ahead * self._costs.verify_seconds(self._rows)
        if EARLY_SHARE * self._costs.correction.verify * verified < median(self._seconds):
            return False
        # What is to be expected of new sequences is worth as much as drafts are.
        return others or served >= self.rounds(self._rows, drafts or self._came > 0, self._planned_at)

    def planned(self, seconds: float) -> None:
        """This round has a new plan. Observing and planning took so long by the host's clock: no word for ranks that
        have to agree."""
        self._planned_for, self._planned_at = self._rows, self._age
        self._served = self._came = self._left = 0
        self._verified = 0.0
        if self._learns:
            self._seconds.append(seconds)

    def rounds(self, num_rows: int, drafts: bool, age: float) -> int:
        """For so many sequences, by a plan with any drafts or one without, made when they were so many rounds old.

        Of new sequences little is known yet: what is learnt in their first rounds tells most.
        """
        verify = self._costs.correction.verify * self._costs.verify_seconds(num_rows)
        affordable = (PLANNING_SHARE if drafts else IDLE_SHARE) * verify
        most = math.ceil(median(self._seconds) / affordable) if affordable > 0 else 1
        return max(1, min(most, int(age), self.most))


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
