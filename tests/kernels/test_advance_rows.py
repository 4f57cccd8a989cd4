"""`advance_rows` against the same thing in plain Python, one row at a time, and its kernel against the reference."""

import math
import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_del.kernels.advance_rows import NO_TOKEN, PAD_SLOT, Said, advance_rows

from tests.kernels.conftest import OnTriton

GARBAGE = -987_654


@dataclass
class Rows:
    """What the caller holds: buffers longer than the batch, of which `advance_rows` sees the first rows."""

    num_rows: int
    max_model_len: int
    block_sizes: list[int]
    positions: torch.Tensor
    live: torch.Tensor
    block_tables: list[torch.Tensor]
    seq_lens: torch.Tensor
    slots: torch.Tensor

    def advance(self, operation: Callable[..., None] = advance_rows, said: Said | None = None) -> None:
        operation(
            self.positions[: self.num_rows],
            self.seq_lens[: self.num_rows],
            self.live[: self.num_rows],
            [table[: self.num_rows] for table in self.block_tables],
            self.block_sizes,
            list(self.slots[:, : self.num_rows]),
            self.max_model_len,
            said,
        )


def make_rows(
    max_model_len: int,
    block_sizes: list[int],
    rows: list[tuple[int, bool]],
    num_unused_rows: int = 0,
    block_ids: random.Random | None = None,
) -> Rows:
    """Rows of (position, live), each with blocks of its own in every group, in no order."""
    num_rows, num_all = len(rows), len(rows) + num_unused_rows
    order = block_ids or random.Random(0)
    tables = []
    for block_size in block_sizes:
        blocks_per_row = -(-max_model_len // block_size)
        blocks = list(range(num_all * blocks_per_row))
        order.shuffle(blocks)
        tables.append(torch.tensor(blocks, dtype=torch.int32).view(num_all, blocks_per_row))
    unused = [(GARBAGE, True)] * num_unused_rows
    return Rows(
        num_rows=num_rows,
        max_model_len=max_model_len,
        block_sizes=block_sizes,
        positions=torch.tensor([position for position, _ in rows + unused], dtype=torch.int64),
        live=torch.tensor([live for _, live in rows + unused], dtype=torch.bool),
        block_tables=tables,
        seq_lens=torch.full((num_all,), GARBAGE, dtype=torch.int32),
        slots=torch.full((len(block_sizes), num_all), GARBAGE, dtype=torch.int64),
    )


def expected_row(
    position: int, live: bool, tables: list[list[int]], block_sizes: list[int], max_model_len: int
) -> tuple[int, bool, int, list[int]]:
    """(position, live, sequence length, slot in each group) of one row after one step."""
    if live and position + 1 == max_model_len:
        live = False
    elif live:
        position += 1
    position = min(max(position, 0), max_model_len - 1)
    slots = []
    for table, block_size in zip(tables, block_sizes, strict=True):
        block, offset = divmod(position, block_size)
        slots.append(table[block] * block_size + offset if live else -1)
    return position, live, position + 1 if live else 1, slots


def check_step(rows: Rows) -> None:
    """Advance once, and compare all of it with `expected_row`."""
    positions, live = rows.positions.tolist(), rows.live.tolist()
    tables = [table.tolist() for table in rows.block_tables]
    rows.seq_lens.fill_(GARBAGE)
    rows.slots.fill_(GARBAGE)
    rows.advance()

    for row in range(rows.num_rows):
        row_tables = [table[row] for table in tables]
        expected = expected_row(positions[row], live[row], row_tables, rows.block_sizes, rows.max_model_len)
        actual = (
            rows.positions[row].item(),
            rows.live[row].item(),
            rows.seq_lens[row].item(),
            rows.slots[:, row].tolist(),
        )
        assert actual == expected, f"row {row}"
    # What belongs to no row, and what is only read, is left alone.
    assert rows.positions[rows.num_rows :].tolist() == positions[rows.num_rows :]
    assert rows.live[rows.num_rows :].tolist() == live[rows.num_rows :]
    assert (rows.seq_lens[rows.num_rows :] == GARBAGE).all()
    assert (rows.slots[:, rows.num_rows :] == GARBAGE).all()
    assert [table.tolist() for table in rows.block_tables] == tables


@st.composite
def any_rows(draw: st.DrawFn) -> Rows:
    max_model_len = draw(st.integers(1, 40))
    block_sizes = draw(st.lists(st.integers(1, 17), max_size=3))
    # A row that is live fed a position that exists, or is about to feed its first; one that is not may hold anything.
    live_row = st.tuples(st.integers(-1, max_model_len - 1), st.just(True))
    dead_row = st.tuples(st.integers(-1, max_model_len + 8), st.just(False))
    rows = draw(st.lists(st.one_of(live_row, dead_row), max_size=9))
    order = draw(st.randoms(use_true_random=False))
    return make_rows(max_model_len, block_sizes, rows, draw(st.integers(0, 2)), order)


@given(rows=any_rows(), num_steps=st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_equals_plain_python_step_after_step(rows: Rows, num_steps: int):
    for _ in range(num_steps):
        check_step(rows)


@given(rows=any_rows(), num_steps=st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_no_slot_is_written_twice(rows: Rows, num_steps: int):
    """Disjoint block tables give disjoint slots: over the rows, and over the steps of a round."""
    written: list[set[int]] = [set() for _ in rows.block_sizes]
    for _ in range(num_steps):
        rows.advance()
        for group, slots in enumerate(rows.slots[:, : rows.num_rows].tolist()):
            given_out = [slot for slot in slots if slot != PAD_SLOT]
            assert len(given_out) == int(rows.live[: rows.num_rows].sum())
            assert len(set(given_out)) == len(given_out)
            assert not written[group].intersection(given_out)
            written[group].update(given_out)


@given(rows=any_rows(), num_steps=st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_dead_rows_stay_dead_and_write_nothing(rows: Rows, num_steps: int):
    for _ in range(num_steps):
        dead_before = ~rows.live[: rows.num_rows]
        rows.advance()
        live = rows.live[: rows.num_rows]
        assert not (live & dead_before).any()
        assert (rows.slots[:, : rows.num_rows][:, ~live] == PAD_SLOT).all()
        assert (rows.slots[:, : rows.num_rows][:, live] >= 0).all()


@given(rows=any_rows(), num_steps=st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_positions_stay_within_the_model(rows: Rows, num_steps: int):
    for _ in range(num_steps):
        rows.advance()
        positions, live = rows.positions[: rows.num_rows], rows.live[: rows.num_rows]
        assert ((positions >= 0) & (positions < rows.max_model_len)).all()
        assert (rows.seq_lens[: rows.num_rows] == (positions + 1).where(live, 1)).all()


def test_the_last_position_is_used_and_no_further():
    rows = make_rows(max_model_len=8, block_sizes=[4], rows=[(5, True)])
    seen = []
    for _ in range(4):
        rows.advance()
        seen.append((rows.positions.item(), rows.live.item(), rows.slots.item() == PAD_SLOT))
    assert seen == [(6, True, False), (7, True, False), (7, False, True), (7, False, True)]


@pytest.mark.parametrize("block_sizes", [[], [16], [16, 32, 8]])
def test_no_rows(block_sizes: list[int]):
    check_step(make_rows(max_model_len=64, block_sizes=block_sizes, rows=[]))


def test_no_kv_cache_yet():
    """Memory profiling drafts before there is one: positions move, no slot is asked for."""
    rows = make_rows(max_model_len=64, block_sizes=[], rows=[(3, True), (9, False)])
    check_step(rows)
    assert rows.positions.tolist() == [4, 9]


def test_slots_of_a_large_cache_do_not_overflow():
    """Block numbers are 32 bits wide; slot numbers need more."""
    block_size, last_block = 1024, 2**31 - 1
    rows = make_rows(max_model_len=block_size, block_sizes=[block_size], rows=[(block_size - 2, True)])
    rows.block_tables[0].fill_(last_block)
    check_step(rows)
    assert rows.slots.item() == last_block * block_size + block_size - 1


def test_groups_must_match():
    rows = make_rows(max_model_len=64, block_sizes=[16, 32], rows=[(3, True)])
    rows.block_sizes = [16]
    with pytest.raises(ValueError, match="zip"):
        rows.advance()


def advanced_by_the_kernel(device: str, rows: Rows, num_steps: int, said: Said | None = None) -> Rows:
    from vllm_del.kernels.advance_rows import triton

    rows.positions, rows.live = rows.positions.to(device), rows.live.to(device)
    rows.seq_lens, rows.slots = rows.seq_lens.to(device), rows.slots.to(device)
    rows.block_tables = [table.to(device) for table in rows.block_tables]
    for _ in range(num_steps):
        rows.advance(triton.advance_rows, said)
    return rows


def check_kernel(on_triton: OnTriton, rows: Rows, num_steps: int) -> None:
    given = on_triton(advanced_by_the_kernel, deepcopy(rows), num_steps)
    for _ in range(num_steps):
        rows.advance()
    for name in ("positions", "live", "seq_lens", "slots"):
        assert torch.equal(getattr(given, name).cpu(), getattr(rows, name)), name


@given(rows=any_rows(), num_steps=st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_the_kernel_equals_the_reference(on_triton: OnTriton, rows: Rows, num_steps: int):
    check_kernel(on_triton, rows, num_steps)


@st.composite
def any_said(draw: st.DrawFn, rows: Rows) -> tuple[Said, list[tuple[int, float, int, float]]]:
    """What was said of the rows, with room for a few that are in the round no more; and the same, row by row."""
    number, step, longest = rows.num_rows, draw(st.integers(0, 3)), 4
    sure = st.sampled_from([0.0, 0.25, 0.5, 1.0, math.nan])
    one = st.tuples(st.integers(0, 99), sure, st.integers(0, longest), sure)
    each = draw(st.lists(one, min_size=number, max_size=number))
    token, confidence, length, stop_below = (list(values) for values in zip(*each, strict=True)) if each else ([],) * 4
    order = list(range(number + 3))
    draw(st.randoms(use_true_random=False)).shuffle(order)
    said = Said(
        torch.tensor(token, dtype=torch.int64),
        torch.tensor(confidence, dtype=torch.float32),
        step,
        torch.tensor(length, dtype=torch.int64),
        torch.tensor(stop_below, dtype=torch.float32),
        torch.full((number,), GARBAGE, dtype=torch.int32),
        torch.tensor(order[:number], dtype=torch.int64),
        torch.full((number + 3, longest), GARBAGE, dtype=torch.int64),
        torch.full((number + 3, longest), GARBAGE, dtype=torch.float32),
    )
    return said, each


@given(data=st.data(), rows=any_rows())
@settings(max_examples=200, deadline=None)
def test_what_was_said_is_written_down_and_rows_stop(data: st.DataObject, rows: Rows):
    said, each = data.draw(any_said(rows))
    live = rows.live[: rows.num_rows].tolist()
    silent = deepcopy(rows)
    rows.advance(said=said)

    tokens = torch.full_like(said.tokens, GARBAGE)
    confidences = torch.full_like(said.confidences, GARBAGE)
    for row, (token, confidence, length, stop_below) in enumerate(each):
        tokens[said.place[row], said.step] = token if live[row] else NO_TOKEN
        confidences[said.place[row], said.step] = confidence
        assert said.input_ids[row] == token
        silent.live[row] = live[row] and not confidence < stop_below and length > said.step + 1
    assert torch.equal(said.tokens, tokens)
    assert torch.equal(said.confidences.nan_to_num(7), confidences.nan_to_num(7))
    # Who stops is not live at the next position, and all else is as at the beginning of a round.
    silent.advance()
    for name in ("positions", "live", "seq_lens", "slots"):
        assert torch.equal(getattr(rows, name), getattr(silent, name)), name


@given(data=st.data(), rows=any_rows())
@settings(max_examples=60, deadline=None)
def test_the_kernel_says_it_too(on_triton: OnTriton, data: st.DataObject, rows: Rows):
    said, _ = data.draw(any_said(rows))
    given, written = on_triton(ended_by_the_kernel, deepcopy(rows), deepcopy(said))
    rows.advance(said=said)
    for name in ("positions", "live", "seq_lens", "slots"):
        assert torch.equal(getattr(given, name).cpu(), getattr(rows, name)), name
    for name in ("input_ids", "tokens", "confidences"):
        torch.testing.assert_close(getattr(written, name).cpu(), getattr(said, name), equal_nan=True)


def ended_by_the_kernel(device: str, rows: Rows, said: Said) -> tuple[Rows, Said]:
    said = Said(*(value.to(device) if isinstance(value, torch.Tensor) else value for value in said))
    return advanced_by_the_kernel(device, rows, 1, said), said


def test_the_kernel_with_many_rows(on_triton: OnTriton):
    """More than one program has."""
    check_kernel(on_triton, make_rows(100, [16, 8], [(i % 103 - 1, i % 3 > 0) for i in range(300)], 3), 2)


def test_the_kernel_in_a_large_cache(on_triton: OnTriton):
    rows = make_rows(max_model_len=1024, block_sizes=[1024], rows=[(1022, True)])
    rows.block_tables[0].fill_(2**31 - 1)
    check_kernel(on_triton, rows, 1)
    assert rows.slots.item() == (2**31 - 1) * 1024 + 1023
