"""A round over a model of pure arithmetic: who drafts what, how often each segment runs, and where a row stops."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_del.draft.loop import NO_TOKEN, DraftRows, Drafts, Plan, draft, eager
from vllm_del.draft.together import Together

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
    def expected(batch, max_model_len: int, together: Together | None) -> list[list[int]]:
        """Of all rows of a batch, step by step."""
        drafted: list[list[int]] = [[] for _ in batch]
        survived = [1.0] * len(batch)
        going = {at: row for at, row in enumerate(batch) if row[-1]}
        for step in range(max(row[3] for row in batch)):
            going = {at: row for at, row in going.items() if step < row[3] and row[1] + step + 1 < max_model_len}
            if together is not None and step and going:
                brings = [survived[at] * together.acceptance[at] - together.itself[at] for at in going]
                if sum(brings) < together.shared:
                    break
            for at, (first, position, exit, _, stop, _) in list(going.items()):
                token = ((drafted[at] or [first])[-1] + position + step + 1 + 10**exit) % VOCAB
                drafted[at].append(token)
                sure = (token % 10) / 10
                if sure < stop:
                    del going[at]
                if together is not None:
                    doubtful = sure < together.doubt_below[at]
                    chance = together.offset[at] + together.slope[at] * sure
                    survived[at] *= min(max(chance, 0.0), 1.0) if doubtful else together.acceptance[at]
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
    st.sampled_from([math.nan, 0.0, 0.15, 0.35, 0.55]),
    st.booleans(),
)

# Of a row: acceptance, doubt, offset, slope, and what it has to bring. In sums of these no two orders differ.
of_together = st.tuples(
    st.sampled_from([0.25, 0.5, 0.75, 1.0]),
    st.sampled_from([math.nan, 0.25, 0.65]),
    st.sampled_from([-0.25, 0.0, 0.25]),
    st.sampled_from([0.0, 1.0, 2.0]),
    st.sampled_from([0.0, 0.125, 0.25]),
)


@settings(max_examples=300, deadline=None)
@given(
    batch=st.lists(row, min_size=1, max_size=5),
    compact=st.booleans(),
    by_row=st.none() | st.lists(of_together, min_size=5, max_size=5),
    shared=st.sampled_from([-1.0, 0.3, 0.7, 1.3]),
)
def test_each_row_drafts_its_plan(batch, compact: bool, by_row, shared: float) -> None:
    max_model_len, most = 63, 5
    tokens, positions, exits, lengths, stops, live = map(list, zip(*batch, strict=True))
    model, together = Model(3), None
    if by_row is not None:
        together = Together(*np.array(by_row[: len(batch)]).T, shared, np.ones(len(batch)))
    plan = Plan(torch.tensor(exits), torch.tensor(lengths), torch.tensor(stops), max(exits), max(lengths), together)
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
    for at, expected in enumerate(Model.expected(batch, max_model_len, together if compact else None)):
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
    plan = Plan(torch.tensor([1]), torch.tensor([2]), torch.full((1,), 0.5), 1, 2).padded(3, 2, 4)
    assert plan.length.tolist() == [2, 0, 0]
    assert (plan.deepest, plan.longest) == (2, 4)


def test_few_rows_do_not_pay_for_a_step_that_many_would() -> None:
    """Two of four rows are through with their drafts; what is left of the others is not worth a step of all."""
    rows = 4
    batch = [(5, 10, 0, 2 if at < 2 else 5, math.nan, True) for at in range(rows)]
    values = [np.full(rows, value) for value in (0.9, math.nan, 0.0, 0.0, 0.1)]
    drafted = []
    for shared in (0.0, 1.5):
        plan = Plan(
            torch.zeros(rows, dtype=torch.int64),
            torch.tensor([row[3] for row in batch]),
            torch.full((rows,), math.nan),
            0,
            5,
            Together(*values, shared, np.ones(rows)),
        )
        drafts = Drafts(torch.zeros(rows, 5, dtype=torch.int64), torch.zeros(rows, 5))
        model, live = Model(1), [True] * rows
        forward = eager(model.segments, model.head, lambda step, rows: nullcontext())
        draft(forward, rows_of([5] * rows, [10] * rows, live), plan, 63, drafts, True)
        drafted.append((drafts.tokens != NO_TOKEN).sum(1).tolist())
    assert drafted == [[2, 2, 5, 5], [2, 2, 2, 2]]
