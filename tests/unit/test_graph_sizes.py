"""Which sizes of batch have graphs of draft steps: few of vLLM's own, and for any batch one not much larger."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.config.compilation import CUDAGraphMode

from vllm_del.engine import graphs as graphs_module
from vllm_del.engine.graphs import MOST_GRAPHS, SPARSE, DraftGraphs, thinned

# vLLM's default for 256 sequences
DEFAULT = [1, 2, 4, *range(8, 257, 8)]


def test_vllms_own_sizes() -> None:
    assert thinned(DEFAULT, 99) == [1, 2, 4, 8, 16, 24, 32, 40, 56, 64, 80, 104, 128, 160, 200, 256]


@pytest.mark.parametrize("sizes", [[], [3], [1, 2], [100, 101]])
def test_few_sizes_are_all_kept(sizes: list[int]) -> None:
    assert thinned(sizes, 1000) == sizes


@given(st.sets(st.integers(1, 1000), min_size=1).map(sorted))
def test_any_sizes(sizes: list[int]) -> None:
    kept = thinned(sizes, 1000)
    assert set(kept) <= set(sizes)
    assert kept[0] == sizes[0]
    assert kept[-1] == sizes[-1]
    powers = {2**i for i in range(10)}
    assert powers & set(sizes) <= set(kept)
    assert all(b >= SPARSE * a or b in powers for a, b in pairwise(kept[:-1]))
    # What is left out has one that is kept a little below it.
    assert all(any(a <= size < SPARSE * a for a in kept) for size in set(sizes) - set(kept))


@pytest.mark.parametrize(
    ("segments", "sizes", "largest"), [(1, 19, 512), (4, 19, 512), (8, 10, 512), (16, 7, 128), (63, 2, 4), (500, 1, 1)]
)
def test_no_more_than_are_recorded_in_time(
    graph_config: Callable[..., Any], segments: int, sizes: int, largest: int
) -> None:
    """With the exits of "auto" all sizes are; with many exits there are fewer, and none of the largest."""
    config = graph_config([1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)], 1024)
    device, exits = torch.device("cpu"), torch.zeros(1024, dtype=torch.int64)
    graphs = DraftGraphs(config, device, CUDAGraphMode.FULL_AND_PIECEWISE, [Mock()] * segments, Mock(), Mock(), exits)
    ((mode, descs),) = graphs._capture_descs.items()
    assert mode == CUDAGraphMode.FULL
    assert len(descs) <= max(MOST_GRAPHS, 1 + segments)
    recorded = sorted({desc.num_tokens for desc in descs})
    assert (len(recorded), recorded[0], recorded[-1]) == (sizes, 1, largest)
    # Each size with all of its stages
    assert len(descs) == len({desc.num_tokens for desc in descs}) * (1 + segments)
    graphs._graphs_captured = True
    assert graphs.dispatch(1, 1, 1, 0).cg_mode == CUDAGraphMode.FULL
    assert all(graphs.dispatch(rows, rows, 1, 0).num_tokens <= 4 * rows for rows in range(1, largest + 1))
    assert graphs.dispatch(largest + 1, largest + 1, 1, 0).cg_mode == CUDAGraphMode.NONE
    assert config.compilation_config.cudagraph_capture_sizes[-1] == 512, "vLLM's own are as they were"


def test_the_log_says_what_was_recorded(graph_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(graphs_module.logger, "info_once", lambda text, *values: said.append(text % values))
    config = graph_config([1, 2, 4], 4)
    graphs = DraftGraphs(
        config, torch.device("cpu"), CUDAGraphMode.FULL, [Mock()], Mock(), Mock(), torch.zeros(4, dtype=torch.int64)
    )
    graphs.log()
    assert not said, "none were recorded"
    graphs.graphs = dict.fromkeys(graphs._capture_descs[CUDAGraphMode.FULL], Mock())
    graphs._seconds, graphs._bytes = 1.25, 3 << 20
    graphs.log()
    assert said == ["del: 6 CUDA graphs of draft steps, for up to 4 sequences, took 1.2 s and 3 MiB"]
