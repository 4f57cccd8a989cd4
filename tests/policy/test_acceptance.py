"""The statistics against an oracle of the paper's rules, over a thousand random sequences in one batch."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.policy.oracle import Oracle
from vllm_del.policy.acceptance import AcceptanceStatistics, kept_positions, rising
from vllm_del.policy.objective import best_by_tokens_per_layer

TRACES = 1000
ROUNDS = 12
MAX_LENGTH = 17
NUM_LAYERS = 16
DEPTHS = [1, 2, 3, 5, 8, 12]
PROMPT = 32

Position = list[tuple[bool, float]]


def random_position(rng: random.Random, rates: list[float]) -> Position:
    """Of a text on which exit i agrees with the target at rate i; surer of itself when it does."""
    outcomes = [rng.random() < rate for rate in rates]
    return [(match, rng.betavariate(4, 2) if match else rng.betavariate(2, 4)) for match in outcomes]


def test_choices_and_thresholds_are_the_papers() -> None:
    """All sequences share the tensors, each with its own history: nothing may leak from one to another."""
    rng = random.Random(0)
    oracles = [Oracle(DEPTHS, NUM_LAYERS, MAX_LENGTH) for _ in range(TRACES)]
    rates = [sorted(rng.random() for _ in DEPTHS) for _ in range(TRACES)]
    statistics = AcceptanceStatistics(TRACES, len(DEPTHS), torch.device("cpu"))
    slots = torch.randperm(TRACES, generator=torch.Generator().manual_seed(0))
    chosen = [(0, 1)] * TRACES  # the paper's first round: one token from the first exit
    different = set()
    for round_ in range(ROUNDS):
        prompts = [
            [random_position(rng, r) for _ in range(rng.randint(0, PROMPT))] if not round_ else [] for r in rates
        ]
        drafts = [
            [random_position(rng, r) for _ in range(length + 1)] for r, (_, length) in zip(rates, chosen, strict=True)
        ]
        accepted = [
            oracle.observe(exit_, prompt, positions)
            for oracle, (exit_, _), prompt, positions in zip(oracles, chosen, prompts, drafts, strict=True)
        ]
        observe(statistics, slots, prompts, drafts, accepted)
        exits, lengths = best_by_tokens_per_layer(
            statistics.acceptance(slots), torch.tensor(DEPTHS), NUM_LAYERS, MAX_LENGTH
        )
        chosen = [oracle.choose() for oracle in oracles]
        assert list(zip(exits.tolist(), lengths.tolist(), strict=True)) == chosen
        different |= set(chosen)
        thresholds = statistics.stop_below(slots).tolist()
        for oracle, row in zip(oracles, thresholds, strict=True):
            for exit_, actual in enumerate(row):
                expected = oracle.threshold(exit_)
                assert math.isnan(actual) if expected is None else actual == pytest.approx(expected)
    assert len(different) > 30


def observe(
    statistics: AcceptanceStatistics,
    slots: torch.Tensor,
    prompts: list[list[Position]],
    drafts: list[list[Position]],
    accepted: list[int],
) -> None:
    """The same round as tensors: prompt positions first, then the drafted ones, all padded to the longest."""
    width = MAX_LENGTH + 1
    matched = torch.zeros(TRACES, PROMPT + width, len(DEPTHS), dtype=torch.bool)
    confidence = torch.full(matched.shape, math.nan)
    there = torch.zeros(TRACES, PROMPT + width, dtype=torch.bool)
    for row, (prompt, positions) in enumerate(zip(prompts, drafts, strict=True)):
        for begin, part in ((0, prompt), (PROMPT, positions)):
            for at, position in enumerate(part, begin):
                matched[row, at] = torch.tensor([match for match, _ in position])
                confidence[row, at] = torch.tensor([value for _, value in position])
                there[row, at] = True
    there[:, PROMPT:] &= kept_positions(torch.tensor(accepted), width)
    values = matched, confidence, there.unsqueeze(-1).expand_as(matched)
    statistics.observe(slots, *(value.unsqueeze(0) for value in values))


class TestSlots:
    def one(self, statistics: AcceptanceStatistics, slot: int, match: bool, confidence: float = 0.5) -> None:
        shape = (1, 1, 1, 2)
        statistics.observe(
            torch.tensor([slot]),
            torch.full(shape, match),
            torch.full(shape, confidence),
            torch.tensor([[[[True, False]]]]),
        )

    def test_unknown_is_nan_and_stops_nothing(self) -> None:
        statistics = AcceptanceStatistics(3, 2, torch.device("cpu"))
        self.one(statistics, 1, True)
        acceptance = statistics.acceptance(torch.tensor([0, 1]))
        assert acceptance.isnan().tolist() == [[True, True], [False, True]]
        assert not (torch.zeros(2) < statistics.stop_below(torch.tensor([1]))).any()

    def test_reset_forgets_one_slot_only(self) -> None:
        statistics = AcceptanceStatistics(3, 2, torch.device("cpu"))
        for slot in (0, 1):
            self.one(statistics, slot, True)
        statistics.reset(torch.tensor([1]))
        assert statistics.acceptance(torch.tensor([0, 1]))[:, 0].isnan().tolist() == [False, True]
        self.one(statistics, 1, False)
        assert statistics.acceptance(torch.tensor([1]))[0, 0] == 0

    def test_old_rounds_fade(self) -> None:
        statistics = AcceptanceStatistics(1, 2, torch.device("cpu"), decay=0.5)
        self.one(statistics, 0, True)
        self.one(statistics, 0, False)
        assert statistics.acceptance(torch.tensor([0]))[0, 0].item() == pytest.approx(0.5 / 1.5)

    def test_an_exit_that_is_not_scored_keeps_its_memory(self) -> None:
        statistics = AcceptanceStatistics(1, 2, torch.device("cpu"), decay=0.5)
        slot, shape = torch.tensor([0]), (1, 1, 1, 2)
        yes = torch.ones(shape, dtype=torch.bool)
        statistics.observe(slot, yes, torch.ones(shape), yes)
        self.one(statistics, 0, False)  # of the first exit only
        assert statistics.acceptance(slot)[0].tolist() == pytest.approx([0.5 / 1.5, 1.0])


@settings(deadline=None)
@given(st.data())
def test_several_rounds_at_once_are_as_one_after_the_other(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    shape = tuple(data.draw(st.integers(1, most)) for most in (5, 3, 3, 3))
    matched, scored = (torch.rand(shape, generator=generator) < 0.5 for _ in range(2))
    confidence = torch.rand(shape, generator=generator).masked_fill(~scored, math.nan)
    slots = torch.randperm(4, generator=generator)[: shape[1]]
    at_once, one_by_one = (AcceptanceStatistics(4, shape[3], torch.device("cpu")) for _ in range(2))
    for statistics in (at_once, one_by_one):
        statistics.observe(
            slots, *(torch.ones(1, *shape[1:], dtype=kind) for kind in (torch.bool, torch.float, torch.bool))
        )
    at_once.observe(slots, matched, confidence, scored)
    for place in range(shape[0]):
        one_by_one.observe(slots, *(values[place : place + 1] for values in (matched, confidence, scored)))
    for name in ("_counts", "_confidence", "_squares"):
        torch.testing.assert_close(getattr(at_once, name), getattr(one_by_one, name))
    torch.testing.assert_close(at_once.population.counts, one_by_one.population.counts)
    # How well the mean foretold them differs: at once, all of them were planned by what was known before the first.


class TestEstimate:
    def test_without_anything_it_is_even_odds(self) -> None:
        statistics = AcceptanceStatistics(2, 3, torch.device("cpu"))
        assert statistics.estimate(torch.tensor([1])).tolist() == [[0.5, 0.5, 0.5]]

    def test_a_new_sequence_starts_from_the_mean_of_all(self) -> None:
        statistics = AcceptanceStatistics(2, 1, torch.device("cpu"), decay=1.0)
        for match in [True] * 9 + [False]:
            shape = (1, 1, 1, 1)
            yes = torch.ones(shape, dtype=torch.bool)
            statistics.observe(torch.tensor([0]), yes & match, torch.ones(shape), yes)
        _, new = statistics.estimate(torch.tensor([0, 1]))[:, 0].tolist()
        assert new == pytest.approx(9.5 / 11, abs=0.01)

    @given(counts=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=6))
    def test_rises_with_depth_and_stays_within_what_was_seen(self, counts: list[tuple[int, int]]) -> None:
        statistics = AcceptanceStatistics(1, len(counts), torch.device("cpu"))
        statistics._counts[0] = torch.tensor(counts)
        # One of even odds before anything was seen.
        rate = [(m + 0.5) / (m + n + 1) for m, n in counts]
        estimate = statistics.estimate(torch.tensor([0]))[0].tolist()
        assert estimate == sorted(estimate)
        assert min(rate) - 1e-9 <= min(estimate) <= max(estimate) <= max(rate) + 1e-9
        if rate == sorted(rate):
            assert estimate == pytest.approx(rate)

    def test_what_was_seen_often_gives_way_little_to_what_was_seen_rarely(self) -> None:
        statistics = AcceptanceStatistics(1, 2, torch.device("cpu"))
        statistics._counts[0] = torch.tensor([[90, 10], [3, 3]])
        first, second = statistics.estimate(torch.tensor([0]))[0].tolist()
        assert first == second == pytest.approx((93 + 2 * 0.5) / (106 + 2))


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 20)), min_size=1, max_size=7))
def test_rising_means_are_those_of_pooled_neighbours(seen: list[tuple[float, int]]) -> None:
    """The textbook's way: as long as one is above the next, both become their mean."""
    blocks: list[tuple[float, int, int]] = []
    for rate, count in seen:
        blocks.append((rate, count, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (left, n, size), (right, m, more) = blocks[-2:]
            blocks[-2:] = [((left * n + right * m) / (n + m), n + m, size + more)]
    expected = [rate for rate, _, size in blocks for _ in range(size)]
    rates, counts = torch.tensor(seen, dtype=torch.float64).T.unsqueeze(1)
    assert rising(rates * counts, counts)[0].tolist() == pytest.approx(expected, abs=1e-9)


def test_chances_by_confidence_are_on_the_least_squares_line() -> None:
    """Against numpy's line through the same points, unfaded."""
    rng = np.random.default_rng(0)
    statistics = AcceptanceStatistics(2, 1, torch.device("cpu"), decay=1.0)
    confidence = rng.uniform(0.1, 1.0, 60)
    matched = rng.random(60) < confidence
    for c, m in zip(confidence, matched, strict=True):
        values = torch.tensor([[[[m]]]]), torch.tensor([[[[c]]]]), torch.ones(1, 1, 1, 1, dtype=torch.bool)
        statistics.observe(torch.tensor([1]), *values)
    slope, intercept = np.polyfit(confidence, matched, 1)
    found = torch.stack(statistics.by_confidence(torch.tensor([1, 0])))[..., 0].T.tolist()
    assert found[0] == pytest.approx([intercept, slope], rel=1e-5)
    assert all(math.isnan(value) for value in found[1]), "nothing is known of the other one"
