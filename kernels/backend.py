"""Which of an operation's two versions runs: Triton's on a GPU and in Triton's interpreter, else the reference."""

from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from typing import Any, TypeVar

import torch

Operation = TypeVar("Operation", bound=Callable[..., Any])


def by_device(reference: Operation) -> Operation:
    """The operation of this name where its first argument lies: `reference`, or what the `triton.py` beside it has."""
    package = reference.__module__.rpartition(".")[0]

    @cache
    def in_triton() -> Any:
        # A build of torch for CPUs comes without Triton.
        return getattr(import_module(f"{package}.triton"), reference.__name__)

    @wraps(reference)
    def run(first: Any, *args: Any, **kwargs: Any) -> Any:
        return (in_triton() if runs_triton(first) else reference)(first, *args, **kwargs)

    return run  # type: ignore[return-value]


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether Triton's versions run where this tensor lies."""
    return tensor.is_cuda or _is_interpreted()


@cache
def _is_interpreted() -> bool:
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)
