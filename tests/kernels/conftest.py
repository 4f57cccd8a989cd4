"""Where kernels run in tests: compiled on a GPU, else in Triton's interpreter, in a process of its own."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch

from tests.engine.interpreter import use_triton_interpreter

OnTriton = Callable[..., Any]
"""`on_triton(check, *args)` is `check(device, *args)` where Triton runs."""


@pytest.fixture(scope="session")
def on_triton() -> Iterator[OnTriton]:
    if torch.cuda.is_available():
        from vllm_del.kernels.exit_head import triton

        # What is best for each of many odd sizes nobody needs to know.
        triton._read_part_tuned.configs = triton.SHAPES[:1]
        yield lambda check, *args: check("cuda", *args)
        return
    # Whether Triton is interpreted is settled when it is imported.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_prepare) as pool:
        yield lambda check, *args: pool.submit(check, "cpu", *args).result()


def _prepare() -> None:
    use_triton_interpreter()
    torch.set_num_threads(1)
