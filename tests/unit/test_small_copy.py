"""Which copies of an LM head in FP8 are made unasked: those that hardly show beside the model."""

import pytest

from vllm_del.engine.draft_head import is_small


@pytest.mark.parametrize(
    ("rows", "hidden_size", "model_gigabytes", "small"),
    [
        (128_256, 4096, 16.1, False),  # Llama 3 8B
        (32_768, 4096, 16.1, True),  # of it, a draft vocabulary
        (128_256, 8192, 141.0, True),  # 70B
        (128_256 // 4, 8192, 141.0 / 4, True),  # on one rank of four
        (128_256, 2048, 2.5, False),  # 1B
    ],
)
def test_models(rows: int, hidden_size: int, model_gigabytes: float, small: bool) -> None:
    assert is_small(rows * hidden_size, int(model_gigabytes * 1e9)) == small
