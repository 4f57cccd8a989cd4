"""Which sizes of batch have graphs of draft steps: few of vLLM's own, and for any batch one not much larger."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_del.engine.graphs import SPARSE, thinned

# vLLM's default for 256 sequences
DEFAULT = [1, 2, 4, *range(8, 257, 8)]


def test_vllms_own_sizes() -> None:
    assert thinned(DEFAULT) == [1, 2, 4, 8, 16, 24, 32, 40, 56, 64, 80, 104, 128, 160, 200, 256]


@pytest.mark.parametrize("sizes", [[], [3], [1, 2], [100, 101]])
def test_few_sizes_are_all_kept(sizes: list[int]) -> None:
    assert thinned(sizes) == sizes


@given(st.sets(st.integers(1, 1000), min_size=1).map(sorted))
def test_any_sizes(sizes: list[int]) -> None:
    kept = thinned(sizes)
    assert set(kept) <= set(sizes)
    assert kept[0] == sizes[0]
    assert kept[-1] == sizes[-1]
    powers = {2**i for i in range(10)}
    assert powers & set(sizes) <= set(kept)
    assert all(b >= SPARSE * a or b in powers for a, b in pairwise(kept[:-1]))
    # What is left out has one that is kept a little below it.
    assert all(any(a <= size < SPARSE * a for a in kept) for size in set(sizes) - set(kept))
