"""What is left for drafts: never more than a sequence wants or has room for, and a reserve that lets newcomers in."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_del.policy.envelope import Reserve, longest_draft, longest_in_room, room_in_blocks, slots_for

LENGTHS = st.integers(0, 64)


@given(LENGTHS, st.integers(-5, 100))
def test_with_the_verifications_own_token_a_draft_is_no_longer_than_wanted(wish: int, still_wanted: int) -> None:
    length = longest_draft(wish, still_wanted)
    assert 0 <= length <= wish
    assert length == 0 or length + 1 <= still_wanted
    assert length == wish or length + 2 > still_wanted


@given(LENGTHS, st.integers(-5, 100), st.integers(0, 2))
def test_the_longest_in_a_room_fits_and_one_more_would_not(wish: int, room: int, ahead: int) -> None:
    length = longest_in_room(wish, room, ahead)
    assert 0 <= length <= wish
    assert length == 0 or slots_for(length, ahead) <= room
    assert length == wish or slots_for(length + 1, ahead) > room


@given(st.integers(1, 2000), st.lists(st.tuples(st.integers(0, 100), st.sampled_from([16, 32, 128])), min_size=1))
def test_room_is_what_all_groups_have(end: int, held: list[tuple[int, int]]) -> None:
    room = room_in_blocks(end, held)
    for blocks, size in held:
        needed = -(-end // size)
        assert -(-(end + room) // size) <= max(needed, blocks), "a block more than it holds or has to take"
    assert room >= 0
    assert any((end + room) % size == 0 for _, size in held), "a whole block is left"


def test_newcomers_leave_the_reserve_only_for_a_while_after_drafts_took_a_block() -> None:
    reserve = Reserve(blocks_per_sequence=2, steps=3)
    reserve.begin_step()
    assert reserve.for_newcomer(3) == 0
    reserve.taken()
    seen = []
    for _ in range(5):
        seen.append(reserve.for_newcomer(3))
        reserve.begin_step()
    assert seen == [6, 6, 6, 6, 0]


def test_in_the_step_after_a_newcomer_was_kept_out_drafts_take_no_block() -> None:
    reserve = Reserve(blocks_per_sequence=2, steps=5)
    reserve.begin_step()
    assert reserve.for_drafts(4) == 8
    reserve.newcomer_waits()
    reserve.begin_step()
    assert reserve.for_drafts(4) is None
    reserve.begin_step()
    assert reserve.for_drafts(4) == 8
