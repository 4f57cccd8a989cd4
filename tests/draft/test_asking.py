"""Exits are asked where an answer may change a plan: in virtual time, by what the policy asks while it serves."""

from collections import Counter
from typing import Any

import pytest
import torch

from tests.draft.test_goodput import CPU_1B, CPU_1B_BF16, LONGEST
from tests.draft.test_no_waits import EXITS, LENGTH, ROWS, policy, verification
from tests.draft.virtual_server import VirtualServer, texts

PLACES = 4


def asked(kind: str, selective: bool = True) -> tuple[Counter[int], float]:
    """How often each exit was asked, and tokens a second."""
    server = VirtualServer(CPU_1B.costs, CPU_1B.depths, LONGEST, CPU_1B.planning)
    policy, counted = server.dynamic(), Counter[int]()
    policy.asker.ask_all(not selective)
    score = policy.shadow.score

    def counting(states: Any, at: Any, exit: Any, target: Any) -> Any:
        counted.update(exit.tolist())
        return score(states, at, exit, target)

    policy.shadow.score = counting  # type: ignore[method-assign]
    for seed in (1, 2):  # it has met the work before
        counted.clear()
        rate = server.rate(texts(kind, CPU_1B.easy, CPU_1B.hard, 6 * PLACES, seed), PLACES, policy)
    return counted, rate


def test_nobody_is_asked_where_no_answer_changes_a_plan() -> None:
    """Of easy texts the first exit is right 92 times of 100. Those that take longer cannot be worth it, and what it
    is worth itself its drafts tell."""
    (all_of_them, before), (some, rate) = asked("easy", selective=False), asked("easy")
    assert set(all_of_them) == {0, 1, 2}
    assert sum(some.values()) < 0.1 * sum(all_of_them.values())
    assert rate > before


@pytest.mark.parametrize("kind", ["hard", "mixed"])
def test_exits_that_could_win_are_asked(kind: str) -> None:
    """Where texts differ, or nothing is drafted, prompts and later tokens tell."""
    found, _ = asked(kind)
    assert found[0] > 30


@pytest.mark.parametrize("places", [1, 4])
def test_what_is_known_of_exits_that_are_not_asked_does_not_go_stale(places: int) -> None:
    """After hard texts come easy ones. What deep exits said of the hard ones must not make the first one look lucky."""
    machine, estimates = CPU_1B_BF16, []
    for asks_all in (True, False):
        server = VirtualServer(machine.costs, machine.depths, LONGEST, machine.planning)
        policy = server.dynamic()
        policy.asker.ask_all(asks_all)
        for kind, number in (("hard", 15), ("easy", 30)):
            server.rate(texts(kind, machine.easy, machine.hard, number * places, 3), places, policy)
        # Of a sequence of which nothing is known
        estimates.append(float(policy.statistics.estimate(torch.tensor([policy.num_slots]))[0, 0]))
    assert estimates[1] > estimates[0] - 0.02
    assert estimates[1] == pytest.approx(machine.easy[0], abs=0.06)


@pytest.mark.parametrize("longest", [0, 1, LENGTH])
def test_a_host_that_only_launches_pays_for_no_position_that_no_row_has(longest: int) -> None:
    """It does not know which of them count, but how many tokens of a row were verified at most."""
    mine, slots, asked = policy("goodput"), torch.tensor([3, 1, 0, 7]), []
    score = mine.shadow.score
    mine.shadow.score = lambda states, at, *pairs: asked.append(len(at)) or score(states, at, *pairs)  # type: ignore[func-returns-value, method-assign]
    limit = torch.full((ROWS,), LENGTH)
    for _ in range(40):
        verified = verification()
        verified.longest, verified.drafted = longest, verified.drafted.clamp_max(longest)
        verified.accepted = verified.accepted.clamp_max(longest)
        mine.observe(slots, verified)
        mine.plan(slots, limit, limit, limit)
    assert max(asked) == ROWS * len(EXITS) * (1 + longest)
    known = mine.statistics._counts.sum()
    assert known > 0, "and heard what they said"
