"""The draft vocabulary: the tokens that were generated most often, counted from verifications."""

from collections import Counter
from itertools import chain

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_del.draft.verified import Verified
from vllm_del.draft.vocabulary import DraftVocabulary

CPU = torch.device("cpu")
TOKENS = 50


def verified(*rows: tuple[list[int], int, int, bool], longest: int = 3) -> Verified:
    """Of each row its drafts, how many of them were accepted, the token that came after, and whether it counts."""
    fed = [[7, *drafts] for drafts, *_ in rows]
    starts = torch.tensor([0, *map(len, fed)]).cumsum(0)[:-1]
    return Verified(
        states=[],
        input_ids=torch.tensor(list(chain(*fed)), dtype=torch.int32),
        start=starts,
        drafted=torch.tensor([len(drafts) for drafts, *_ in rows]),
        accepted=torch.tensor([accepted for _, accepted, *_ in rows]),
        next_token=torch.tensor([token for *_, token, _ in rows], dtype=torch.int32),
        sampled=torch.tensor([sampled for *_, sampled in rows]),
        longest=longest,
        num_tokens=0,
        contexts=0,
        only_decodes=True,
        came=0,
        left=0,
        fresh=[],
        ended=[],
    )


def counts(vocabulary: DraftVocabulary) -> dict[int, float]:
    return {token: count for token, count in enumerate(vocabulary._counts.tolist()) if count}


def test_counts_what_was_generated() -> None:
    """Accepted drafts and the token after them; not what was rejected, nor what an unfinished prompt sampled."""
    vocabulary = DraftVocabulary(4, TOKENS, CPU)
    vocabulary.observe(verified(([11, 12, 13], 2, 14, True), ([11], 0, 15, True), ([], 0, 16, False)))
    assert counts(vocabulary) == {11: 1, 12: 1, 14: 1, 15: 1}
    vocabulary.observe(verified(([11, 12, 13], 3, 14, True)))
    assert counts(vocabulary) == {11: 2, 12: 2, 13: 1, 14: 2, 15: 1}


def test_a_token_of_another_batch_harms_nobody() -> None:
    """Rows that sampled nothing have any number there."""
    vocabulary = DraftVocabulary(4, TOKENS, CPU)
    vocabulary.observe(verified(([], 0, -1, False), ([], 0, 10**6, False), ([], 0, 9, True)))
    assert counts(vocabulary) == {9: 1}


def test_the_first_tokens_before_any_is_known() -> None:
    assert DraftVocabulary(4, TOKENS, CPU).tokens.tolist() == [0, 1, 2, 3]


def test_listed_by_a_user() -> None:
    """In order, and there is nothing to count."""
    vocabulary = DraftVocabulary([30, 2, 40], TOKENS, CPU)
    assert vocabulary.tokens.tolist() == [2, 30, 40]
    assert not vocabulary.is_counted
    assert DraftVocabulary(3, TOKENS, CPU).is_counted


@given(st.lists(st.integers(0, TOKENS - 1), min_size=1, max_size=60), st.integers(1, TOKENS - 1))
@settings(max_examples=100, deadline=None)
def test_the_most_frequent_ones(generated: list[int], size: int) -> None:
    """And of equally frequent ones the first; in place, and whoever follows is told."""
    vocabulary = DraftVocabulary(size, TOKENS, CPU)
    tokens, told = vocabulary.tokens, []
    vocabulary.follow(lambda: told.append(vocabulary.tokens.tolist()))
    vocabulary._left = len(generated)
    for token in generated:
        vocabulary.observe(verified(([], 0, token, True), longest=0))
    often = Counter(generated)
    assert told[1] == sorted(sorted(range(TOKENS), key=lambda token: (-often[token], token))[:size])
    assert vocabulary.tokens is tokens
    assert told == [list(range(size)), tokens.tolist()]


def test_listed_anew_more_and_more_rarely() -> None:
    vocabulary, calls = DraftVocabulary(2, TOKENS, CPU), [0]
    vocabulary.follow(lambda: calls.append(0))
    for _ in range(9000):
        vocabulary.observe(verified(([], 0, 9, True), longest=0))
        calls[-1] += 1
    # The call that lists them anew ends while the next count has begun.
    assert calls[:-1] == [0, 255, 512, 1024, 2048, 4096]


def test_what_was_said_long_ago_fades() -> None:
    """A text of other words takes the places of one as long before it, which is not forgotten at once."""
    vocabulary, seen = DraftVocabulary(1, TOKENS, CPU), []
    for token in (30, 40):
        for _ in range(256 if token == 30 else 8000):
            vocabulary.observe(verified(([], 0, token, True), longest=0))
            seen.append(vocabulary.tokens.item())
    changes = [0, *(i for i in range(1, len(seen)) if seen[i] != seen[i - 1])]
    assert [seen[i] for i in changes] == [0, 30, 40]
