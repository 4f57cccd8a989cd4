"""What a single request may say about `del`: `SamplingParams(extra_args={"del": {...}})`, or `vllm_xargs` over HTTP.

    {"enabled": false}     no drafts for this request
    {"max_draft": 3}       at most three tokens in a draft

Over HTTP, where vLLM takes no nested objects, the same as a string of JSON.
"""

import json
from typing import Any

KEY = "del"
_WHERE = f"extra_args[{KEY!r}] (over HTTP: vllm_xargs)"
_FORM = '{"enabled": true or false, "max_draft": a whole number from 0}'


def longest_wished(extra_args: dict[str, Any] | None, longest: int) -> int:
    """The longest draft that a request allows, of at most `longest` tokens.

    Raises `ValueError`, naming the field and its value, on what is not understood.
    """
    wish = (extra_args or {}).get(KEY)
    if wish is None:
        return longest
    if isinstance(wish, str):
        try:
            wish = json.loads(wish)
        except (json.JSONDecodeError, RecursionError):
            raise ValueError(f"{_WHERE}: {wish!r} is no JSON: give {_FORM}") from None
    if not isinstance(wish, dict):
        raise ValueError(f"{_WHERE}: {wish!r} is not understood: give {_FORM}")
    enabled, max_draft = wish.get("enabled", True), wish.get("max_draft", longest)
    for name, value, is_good in (
        ("enabled", enabled, isinstance(enabled, bool)),
        ("max_draft", max_draft, type(max_draft) is int and max_draft >= 0),
        *((name, value, False) for name, value in wish.items() if name not in ("enabled", "max_draft")),
    ):
        if not is_good:
            raise ValueError(f"{_WHERE}: {name}={value!r} is not understood: give {_FORM}")
    return min(longest, max_draft) if enabled else 0
