"""Shadow work stays within its budget, and is spread evenly."""

import random
from types import SimpleNamespace

import pytest
import torch

from vllm_del.draft import shadow as shadow_module
from vllm_del.draft.head import LogitsHead
from vllm_del.draft.shadow import BURST, ShadowScorer
from vllm_del.policy.cost import SHADOW_ROWS, CostTables, MeasuredCosts

CPU = torch.device("cpu")


def scorer(head: tuple[float, float], share: float = 0.02) -> ShadowScorer:
    """Of a model whose verification of a token takes 100 ms; `head`: of one row, and of `SHADOW_ROWS`."""
    measured = MeasuredCosts(0.0, (1, SHADOW_ROWS), (1.0, 1.0), (1, SHADOW_ROWS), head, (1, 2), (0.1, 0.1))
    return ShadowScorer(lambda states: states, *[SimpleNamespace()] * 2, CostTables(measured, 8, 4, CPU), share, CPU)


@pytest.mark.parametrize("head", [(0.0005, 0.1), (0.007, 0.2), (0.05, 0.06)])
@pytest.mark.parametrize("wanted", [3, 20, 400])
def test_budget(head: tuple[float, float], wanted: int) -> None:
    """Over a thousand rounds the share is kept, and made use of, unless everything wanted costs less."""
    shadow, rounds = scorer(head), 1000
    costs = shadow._costs
    assert costs is not None
    spent, scored = 0.0, []
    for _ in range(rounds):
        shadow.earn(1, drafts=True)
        number = shadow.affordable(wanted, wanted)
        assert number <= wanted
        spent += costs.head_seconds(number)
        scored.append(number)
        assert number == 0 or number >= min(wanted, BURST)
    budget = 0.02 * 0.1 * rounds
    assert spent <= budget
    assert spent >= 0.8 * min(budget, rounds * costs.head_seconds(wanted))
    assert max(scored) >= min(wanted, BURST)


@pytest.mark.parametrize(("by_clock", "slower", "share"), [(True, 1, 0.02), (False, 1, 0.06), (True, 3, 0.06)])
def test_what_scoring_took_is_what_is_spent(
    monkeypatch: pytest.MonkeyPatch, by_clock: bool, slower: int, share: float
) -> None:
    """Of scoring that takes three times what the head alone was measured to take; the last time as all else does."""
    shadow, now, rounds = scorer((0.001, 0.1)), 0.0, 1000
    costs = shadow._costs
    assert costs is not None
    shadow._by_clock, costs.correction.verify = by_clock, slower

    def logits(states: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += 3 * costs.head_seconds(len(states))
        return states

    monkeypatch.setattr(shadow, "head", LogitsHead(logits))
    monkeypatch.setattr(shadow_module, "time", SimpleNamespace(perf_counter=lambda: now))
    for _ in range(rounds):
        shadow.earn(1, drafts=True)
        if number := shadow.affordable(400, 400):
            none = torch.zeros(number, dtype=torch.int64)
            shadow.score([torch.rand(400, 8)], torch.arange(number), none, none)
    assert now == pytest.approx(share * 0.1 * rounds, rel=0.1)


def test_where_nothing_is_drafted_less_is_spent() -> None:
    spent = {}
    for drafts in (True, False):
        shadow = scorer((0.001, 0.1))
        for _ in range(1000):
            shadow.earn(1, drafts)
            spent[drafts] = spent.get(drafts, 0) + shadow.affordable(400, 400)
    assert 0 < spent[False] < 0.7 * spent[True]


def test_rounds_are_asked_whatever_was_accepted_in_them() -> None:
    """Else those with an early rejection, which want little, would be asked more often."""
    rng, asked = random.Random(0), {3: 0, 20: 0}
    shadow = scorer((0.001, 0.2))
    for _ in range(4000):
        shadow.earn(1, drafts=True)
        wanted = rng.choice((3, 20))
        number = shadow.affordable(wanted, 20)
        assert number in (0, wanted)
        asked[wanted] += number > 0
    assert asked[3] == pytest.approx(asked[20], rel=0.15)


def test_nothing_without_a_budget_and_everything_without_costs() -> None:
    shadow = scorer((0.001, 0.1), share=0.0)
    shadow.earn(1, drafts=True)
    assert shadow.affordable(5, 5) == 0
    free = ShadowScorer(lambda states: states, *[SimpleNamespace()] * 2, None, 0.0, CPU)
    free.earn(1, drafts=True)
    assert free.affordable(10_000, 10_000) == 10_000


def test_chosen_evenly_among_what_is_wanted() -> None:
    shadow = scorer((0.001, 0.1))
    wanted = torch.tensor([[True, False, True], [True, True, False]])
    seen = torch.zeros(6)
    for _ in range(3000):
        places = shadow.choose(wanted, 2)
        assert len(places.unique()) == 2
        seen[places] += 1
    assert (seen[~wanted.flatten()] == 0).all()
    # 1,500 of each in the mean, with a standard deviation of 27.
    assert ((seen[wanted.flatten()] - 1500).abs() < 120).all()


def test_choosing_leaves_torchs_own_randomness_alone() -> None:
    shadow = scorer((0.001, 0.1))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    shadow.choose(torch.ones(8, dtype=torch.bool), 4)
    assert torch.equal(torch.rand(3), expected)
