"""A round over a model of pure arithmetic: who drafts what, how often each segment runs, and where a row stops."""

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_del.draft.loop import NO_TOKEN, DraftRows, Drafts, Plan, draft, eager

CPU = torch.device("cpu")
VOCAB = 1000


class Model:
    """Segment i turns a token t at position p into t + p + 10^i; the head takes that, and is sure by its last digit."""

    def __init__(self, exits: int) -> None:
        self.ran = [0] * exits
        self.rows: list[int] = []
        self.segments = [self._segment(i) for i in range(exits)]

    def _segment(self, index: int):
        def run(*inputs):
            self.ran[index] += 1
            if index == 0:
                self.rows.append(len(inputs[0]))
            state = inputs[1] if index else (inputs[0] + inputs[1]).unsqueeze(1)
            return state, None, (state + 10**index) % VOCAB

        return run

    @staticmethod
    def head(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        token = states.squeeze(1).long()
        return token, (token % 10) / 10

    @staticmethod
    def expected(batch, max_model_len: int, together: bool) -> list[list[int]]:
        """Of all rows of a batch, step by step."""
        drafted: list[list[int]] = [[] for _ in batch]
        going = {at: row for at, row in enumerate(batch) if row[-1]}
        for step in range(max(row[3] for row in batch)):
            going = {at: row for at, row in going.items() if step < row[3]}
            going = {at: row for at, row in going.items() if row[1] + step + 1 < max_model_len}
            last = {at: drafted[at][-1] for at in going if drafted[at]}
            if together and last and all((last[at] % 10) / 10 < going[at][5] for at in going):
                break
            for at, (first, position, exit, _, stop, _, _) in list(going.items()):
                token = (last.get(at, first) + position + step + 1 + 10**exit) % VOCAB
                drafted[at].append(token)
                if (token % 10) / 10 < stop:
                    del going[at]
        return drafted


def rows_of(tokens: list[int], positions: list[int], live: list[bool]) -> DraftRows:
    number = len(tokens)
    return DraftRows(
        input_ids=torch.tensor(tokens, dtype=torch.int32),
        positions=torch.tensor(positions),
        seq_lens=torch.zeros(number, dtype=torch.int32),
        live=torch.tensor(live),
        block_tables=[torch.arange(number * 8, dtype=torch.int32).view(number, 8)],
        block_sizes=[16],
        slots=[torch.zeros(number, dtype=torch.int64)],
    )


row = st.tuples(
    st.integers(0, VOCAB - 1),
    st.integers(0, 60),
    st.integers(0, 2),
    st.integers(0, 5),
    st.sampled_from([0.0, 0.15, 0.35, 0.55]),
    st.sampled_from([0.0, 0.35, 0.75, 0.85]),
    st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(batch=st.lists(row, min_size=1, max_size=5), compact=st.booleans(), never=st.booleans())
def test_each_row_drafts_its_plan(batch, compact: bool, never: bool) -> None:
    max_model_len, most = 63, 5
    if never:
        batch = [(*row[:4], math.nan, math.nan, row[-1]) for row in batch]
    tokens, positions, exits, lengths, *stops, live = map(list, zip(*batch, strict=True))
    model = Model(3)
    plan = Plan(torch.tensor(exits), torch.tensor(lengths), torch.tensor(stops), max(exits), max(lengths))
    drafts = Drafts(torch.zeros(len(batch), most, dtype=torch.int64), torch.zeros(len(batch), most))
    draft(
        eager(model.segments, model.head, lambda step, rows: nullcontext()),
        rows_of(tokens, positions, live),
        plan,
        max_model_len,
        drafts,
        compact,
    )
    drafted = []
    # Where nothing is taken out of the batch, no step is saved by ending the round.
    for at, expected in enumerate(Model.expected(batch, max_model_len, together=compact)):
        drafted.append(len(expected))
        assert drafts.tokens[at].tolist() == expected + [NO_TOKEN] * (most - len(expected))
        sure = [(token % 10) / 10 for token in expected]
        assert drafts.confidence[at, : len(expected)].tolist() == pytest.approx(sure)
    if compact:
        # Steps are as many as the longest draft, over the rows that are in it, and go as deep as these.
        assert model.rows == [sum(n > step for n in drafted) for step in range(max(drafted))]
        deepest = [max(e for e, n in zip(exits, drafted, strict=True) if n > step) for step in range(max(drafted))]
        assert model.ran == [sum(exit >= segment for exit in deepest) for segment in range(3)]
    else:
        assert model.rows == [len(batch)] * plan.longest


def test_rows_of_padding_draft_nothing() -> None:
    rows = rows_of([1, 2, 3], [5, 5, 5], [True] * 3)
    rows.begin(torch.tensor([7]), torch.tensor([9]), torch.tensor([2]), torch.tensor([True]))
    assert rows.input_ids.tolist() == [7, 2, 3]
    assert rows.positions.tolist() == [6, -1, -1]
    assert rows.live.tolist() == [True, False, False]


def test_plan_for_ranks_that_go_in_step() -> None:
    plan = Plan(torch.tensor([1]), torch.tensor([2]), torch.full((2, 1), 0.5), 1, 2).padded(3, 2, 4)
    assert plan.length.tolist() == [2, 0, 0]
    assert (plan.deepest, plan.longest) == (2, 4)
