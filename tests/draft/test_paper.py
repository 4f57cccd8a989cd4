"""Under `tpl` the policy does what the paper's algorithm does: beside an oracle of it, over a thousand sequences.

The policy gets what a runner gives it, and the drafting round is played; a sequence's text is how sure each exit was,
and whether it was right, at each position.
"""

import math
import random

import pytest
import torch

from tests.draft.test_no_waits import DeviceHead
from tests.policy.oracle import Oracle
from tests.policy.test_acceptance import DEPTHS, MAX_LENGTH, NUM_LAYERS, Position, random_position
from vllm_del.draft.decide import DynamicPolicy
from vllm_del.draft.loop import NO_TOKEN, Drafts, Launched
from vllm_del.draft.shadow import PROMPT_POSITIONS, ShadowScorer
from vllm_del.draft.verified import Verified

ROWS, BATCHES, ROUNDS = 100, 10, 8
VOCABULARY = 16
RIGHT, WRONG = 0, 1
CPU = torch.device("cpu")


def position(rng: random.Random, rates: list[float]) -> Position:
    """No exit is less sure than one that takes any token for as likely."""
    return [(match, min(max(value, 0.1), 0.99)) for match, value in random_position(rng, rates)]


def states(texts: list[list[Position]]) -> list[torch.Tensor]:
    """Logits, which are what the head here reads: of each exit, and of the whole model, which is always right."""
    flat = [place for text in texts for place in text]
    right = torch.tensor([[match for match, _ in place] for place in flat])
    sure = torch.tensor([[value for _, value in place] for place in flat], dtype=torch.float64)
    # [positions, exits, vocabulary]
    others = ((1 - sure) / (VOCABULARY - 1)).log().unsqueeze(-1).repeat(1, 1, VOCABULARY)
    said = torch.where(right, RIGHT, WRONG).unsqueeze(-1)
    logits = others.scatter(-1, said, sure.log().unsqueeze(-1)).float()
    whole = torch.zeros(len(flat), VOCABULARY).index_fill(1, torch.tensor([RIGHT]), 9.0)
    return [*logits.unbind(1), whole]


def verification(texts: list[list[Position]], seeds: list[int], drafted: list[int], accepted: list[int]) -> Verified:
    """Of texts that begin with so many positions of a prompt."""
    begins = [sum(map(len, texts[:row])) for row in range(ROWS)]
    tokens = sum(map(len, texts))
    return Verified(
        states=states(texts),
        input_ids=torch.full((tokens,), RIGHT),
        start=torch.tensor([begin + seeds[row] for row, begin in enumerate(begins)]),
        drafted=torch.tensor(drafted),
        accepted=torch.tensor(accepted),
        next_token=torch.full((ROWS,), RIGHT),
        sampled=torch.ones(ROWS, dtype=torch.bool),
        longest=max(drafted),
        num_tokens=tokens,
        contexts=0,
        only_decodes=not any(seeds),
        came=0,
        left=0,
        ended=[(row, seeds[row]) for row in range(ROWS) if seeds[row]],
        fresh=[],
    )


@pytest.mark.parametrize("on_host", [True, False])
def test_exits_and_lengths_are_the_papers(on_host: bool) -> None:
    rng, chosen, lengths = random.Random(0), set(), set()
    head = DeviceHead()
    for _ in range(BATCHES):
        shadow = ShadowScorer(lambda logits: logits, head, head, None, 0.0, CPU)
        policy = DynamicPolicy(DEPTHS, NUM_LAYERS, MAX_LENGTH, ROWS, shadow, None, CPU, on_host)
        slots, most = torch.randperm(ROWS), torch.full((ROWS,), MAX_LENGTH)
        rates = [sorted(rng.random() for _ in DEPTHS) for _ in range(ROWS)]
        oracles = [Oracle(DEPTHS, NUM_LAYERS, MAX_LENGTH) for _ in range(ROWS)]
        # The step of the prompts, which verifies no draft.
        seeds = [rng.randint(0, PROMPT_POSITIONS) for _ in range(ROWS)]
        texts = [[position(rng, rates[row]) for _ in range(seeds[row] + 1)] for row in range(ROWS)]
        for oracle, text in zip(oracles, texts, strict=True):
            oracle.observe(0, text[:-1], text[-1:])
        policy.observe(slots, verification(texts, seeds, [0] * ROWS, [0] * ROWS))
        for _ in range(ROUNDS):
            plan = policy.plan(slots, most, most, most)
            exits = [oracle.choose()[0] for oracle in oracles]
            assert plan.exit.tolist() == exits
            assert plan.length.tolist() == [MAX_LENGTH] * ROWS
            texts = []
            for oracle, exit, rate, below in zip(oracles, exits, rates, plan.stop_below.tolist(), strict=True):
                expected = oracle.threshold(exit)
                assert math.isnan(below) if expected is None else below == pytest.approx(expected, rel=1e-5)
                text = [position(rng, rate)]
                while len(text) <= MAX_LENGTH:
                    _, sure = text[-1][exit]
                    text.append(position(rng, rate))
                    if expected is not None and sure < expected:
                        break
                texts.append(text)
            drafted = [len(text) - 1 for text in texts]
            accepted = [
                oracle.observe(exit, [], text) for oracle, exit, text in zip(oracles, exits, texts, strict=True)
            ]
            said = Drafts(torch.full((ROWS, MAX_LENGTH), NO_TOKEN), torch.full((ROWS, MAX_LENGTH), torch.nan))
            for row, text in enumerate(texts):
                said.tokens[row, : drafted[row]] = RIGHT
                own = [sure for _, sure in (place[exits[row]] for place in text[:-1])]
                said.confidence[row, : drafted[row]] = torch.tensor(own)
            policy.record(slots, plan, said, Launched([], 0.0))
            policy.observe(slots, verification(texts, [0] * ROWS, drafted, accepted))
            chosen |= set(exits)
            lengths |= set(drafted)
    assert chosen == set(range(len(DEPTHS)))
    assert len(lengths) > 10
