"""What both runners build goes by the configuration."""

from types import SimpleNamespace

import pytest

from vllm_del.engine.setup import goes_by_clock


@pytest.mark.parametrize(("v2", "ranks", "expected"), [(False, 1, True), (False, 2, False), (True, 1, False)])
def test_no_clock_decides_where_it_is_not_the_devices_or_ranks_have_to_agree(v2: bool, ranks: int, expected: bool):
    parallel = SimpleNamespace(tensor_parallel_size=ranks)
    assert goes_by_clock(SimpleNamespace(use_v2_model_runner=v2, parallel_config=parallel)) is expected  # type: ignore[arg-type]
