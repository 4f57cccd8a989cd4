"""What is counted of a policy's rounds, against counting by hand."""

import random

import torch

from vllm_del.draft.outcome import Drafted, Outcome
from vllm_del.draft.tally import FLUSH_ROUNDS, Tally

EXITS, LONGEST = 3, 4


def test_sums_are_those_of_the_rounds() -> None:
    rng, tally = random.Random(0), Tally(EXITS, LONGEST, torch.device("cpu"))
    rows = []
    for _ in range(FLUSH_ROUNDS):
        batch = []
        for _ in range(rng.randint(1, 5)):
            drafted = rng.randint(0, LONGEST)
            batch.append((rng.randrange(EXITS), drafted, rng.randint(0, drafted), rng.random(), rng.random() < 0.8))
        rows += batch
        exit, length, accepted, expected, allowed = (torch.tensor(column) for column in zip(*batch, strict=True))
        assert not tally.is_due
        tally.add_undrafted(2)
        drafted = Drafted(exit, length, expected, allowed, torch.empty(0))
        tally.add(Outcome(drafted, length, accepted, torch.ones_like(allowed)))
        tally.add_time(0.5, 0.75)
    assert tally.is_due
    counts = tally.counts(tally.flush().tolist())
    for exit in range(EXITS):
        mine = [row for row in rows if row[0] == exit]
        assert counts.drafted[exit] == sum(row[1] for row in mine)
        assert counts.accepted[exit] == sum(row[2] for row in mine)
        # After the first that was not accepted nothing is known.
        tried = [min(row[1], row[2] + 1) for row in mine]
        assert counts.tried[exit] == sum(tried)
        expected = sum(row[3] * number for row, number in zip(mine, tried, strict=True))
        assert abs(counts.expected[exit] - expected) < 1e-5
    for length in range(LONGEST + 1):
        undrafted = 2 * FLUSH_ROUNDS if length == 0 else 0
        assert counts.lengths[length] == undrafted + sum(row[1] == length and row[4] for row in rows)
    assert (counts.planned_seconds, counts.measured_seconds) == (0.5 * FLUSH_ROUNDS, 0.75 * FLUSH_ROUNDS)
    assert not tally.is_due


def test_rounds_without_drafts_alone() -> None:
    tally = Tally(EXITS, LONGEST, torch.device("cpu"))
    tally.add_undrafted(3)
    tally.add_undrafted(1)
    counts = tally.counts(tally.flush().tolist())
    assert (counts.lengths, counts.drafted) == ([4] + [0] * LONGEST, [0] * EXITS)
    assert sum(tally.counts(tally.flush().tolist()).lengths) == 0
