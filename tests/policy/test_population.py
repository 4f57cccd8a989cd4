"""What all sequences together say of one: much where they are alike, little where they differ."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_del.policy.population import MEMORY, STRENGTHS, Population, fading


def strength(population: Population) -> float:
    """By what a sequence that saw nothing but matches is moved."""
    own, mean = torch.tensor([[[10.0, 0.0]]], dtype=torch.float64), population.counts[0, 0] / population.counts[0].sum()
    matches, total = population.estimate(own)
    assert float(matches) == pytest.approx(10 + (float(total) - 10) * float(mean))
    return float(total) - 10


def after(rates: list[float], rounds: int = 300, each: int = 3, seed: int = 0) -> Population:
    """After so many rounds of sequences of these rates, of 20 rounds each."""
    rng, population = random.Random(seed), Population(1, torch.device("cpu"))
    counts = torch.zeros(len(rates), 1, 2, dtype=torch.float64)
    for number in range(rounds):
        if number % 20 == 0:
            counts.zero_()
        matches = torch.tensor([sum(rng.random() < rate for _ in range(each)) for rate in rates])
        seen = torch.stack((matches, each - matches), -1).double().unsqueeze(1)
        population.observe(seen.unsqueeze(0), counts)
        counts += seen
    return population


def test_alike_sequences_are_taken_for_the_average() -> None:
    assert strength(after([0.9] * 4)) > 60


def test_different_sequences_are_taken_at_their_word() -> None:
    assert strength(after([0.95, 0.95, 0.05, 0.05])) < 4


def test_between_the_two() -> None:
    """Rates of 0.7 and 0.9 vary by 0.01 around 0.8: as a beta distribution of 15 counts."""
    assert 6 < strength(after([0.7, 0.9] * 4, rounds=600)) < 40


def test_it_changes_when_sequences_do() -> None:
    """What was seen long ago has faded."""
    population, rng = after([0.95, 0.05] * 2), random.Random(1)
    assert strength(population) < 4
    counts = torch.zeros(4, 1, 2, dtype=torch.float64)
    for number in range(1500):
        if number % 20 == 0:
            counts.zero_()
        matches = torch.tensor([sum(rng.random() < 0.6 for _ in range(3)) for _ in range(4)])
        seen = torch.stack((matches, 3 - matches), -1).double().unsqueeze(1)
        population.observe(seen.unsqueeze(0), counts)
        counts += seen
    assert strength(population) > 30


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8), st.integers(1, 4))
def test_stays_between_the_sequence_and_the_mean(seen: list[tuple[int, int]], rounds: int) -> None:
    """Whatever was seen: no NaN, no rate outside, and a strength among those that are tried."""
    population = Population(1, torch.device("cpu"))
    counts = torch.tensor(seen, dtype=torch.float64).unsqueeze(1)
    for _ in range(50):
        population.observe(counts.expand(rounds, *counts.shape), 1000 * counts)
    assert STRENGTHS[0] - 1e-9 <= strength(population) <= STRENGTHS[-1] + 1e-9
    matches, total = population.estimate(counts)
    assert ((matches >= 0) & (matches <= total)).all()


def test_one_surprise_does_not_decide_for_good() -> None:
    """A sequence of which all matched for long, and then nothing did."""
    population = Population(1, torch.device("cpu"))
    never = torch.tensor([[[[0.0, 1.0]]]], dtype=torch.float64)
    population.observe(never, torch.tensor([[[1e6, 0.0]]], dtype=torch.float64))
    assert population._loss.isfinite().all()
    assert (population._loss < 20).all()


def test_what_was_learnt_stays_while_nothing_is_seen() -> None:
    population = after([0.95, 0.05] * 2)
    before, nothing = strength(population), torch.zeros(1, 4, 1, 2, dtype=torch.float64)
    for _ in range(1000):
        population.observe(nothing, nothing[0])
    assert strength(population) == pytest.approx(before)


def test_a_mean_is_worth_no_more_than_what_was_seen_of_it() -> None:
    """An exit that was never asked would else be taken for one of even odds, with the strength of all others."""
    population = Population(2, torch.device("cpu"))
    seen = torch.tensor([[9.0, 1.0], [0.0, 0.0]], dtype=torch.float64).expand(1, 4, 2, 2)
    population.observe(seen, seen[0])
    matches, total = population.estimate(torch.zeros(1, 2, 2, dtype=torch.float64))
    assert total[0, 0] > 10
    assert matches[0].tolist() == pytest.approx([0.9 * float(total[0, 0]), 0.5], rel=0.02)
    assert float(total[0, 1]) == 1.0


def test_fading() -> None:
    scored = torch.tensor([[True, False], [False, False], [True, False]])
    kept, weight = fading(scored, MEMORY)
    assert kept.tolist() == pytest.approx([MEMORY**2, 1.0])
    assert weight[[0, 2], 0].tolist() == pytest.approx([MEMORY, 1.0])
