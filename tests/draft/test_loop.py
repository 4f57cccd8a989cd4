"""A round over a model of pure arithmetic: who drafts what, how often each segment runs, and where a row stops."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_del.draft.loop import NO_TOKEN, DraftRows, Drafts, Plan, draft

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
    def expected(token: int, position: int, exit: int, length: int, stop_below: float, max_model_len: int) -> list[int]:
        drafted: list[int] = []
        while len(drafted) < length and position + 1 < max_model_len:
            position += 1
            token = (token + position + 10**exit) % VOCAB
            drafted.append(token)
            if (token % 10) / 10 < stop_below:
                break
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
    st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(batch=st.lists(row, min_size=1, max_size=5), compact=st.booleans(), never=st.booleans())
def test_each_row_drafts_its_plan(batch, compact: bool, never: bool) -> None:
    max_model_len, most = 63, 5
    tokens, positions, exits, lengths, stops, live = map(list, zip(*batch, strict=True))
    if never:
        stops = [float("nan")] * len(batch)
    model = Model(3)
    plan = Plan(torch.tensor(exits), torch.tensor(lengths), torch.tensor(stops), max(exits), max(lengths))
    drafts = Drafts(torch.zeros(len(batch), most, dtype=torch.int64), torch.zeros(len(batch), most))
    draft(
        model.segments,
        model.head,
        rows_of(tokens, positions, live),
        plan,
        lambda step, rows: nullcontext(),
        max_model_len,
        drafts,
        compact,
    )
    drafted = []
    for at, (token, position, exit, length, _, lives) in enumerate(batch):
        expected = Model.expected(token, position, exit, length, stops[at], max_model_len) if lives else []
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
    plan = Plan(torch.tensor([1]), torch.tensor([2]), torch.tensor([0.5]), 1, 2).padded(3, 2, 4)
    assert plan.length.tolist() == [2, 0, 0]
    assert (plan.deepest, plan.longest) == (2, 4)
