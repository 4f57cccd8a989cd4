"""Wrapping a function of vLLM's, once, in a way that can be recognised."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

MARK = "_vllm_del_patch"


def wrap(owner: Any, name: str, patch: Callable) -> None:
    """Replace `owner.name` by `patch(original, ...)`, once however often this is called."""
    original = getattr(owner, name)
    if getattr(original, MARK, False):
        return

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return patch(original, *args, **kwargs)

    setattr(patched, MARK, True)
    is_static = isinstance(inspect.getattr_static(owner, name), staticmethod) or name == "__new__"
    setattr(owner, name, staticmethod(patched) if is_static and inspect.isclass(owner) else patched)
