"""The forms in which a user may ask for `del`. Needs no vLLM, so that any version of it can be told."""

from typing import Any

METHOD = "del"


def as_fields(speculative_config: Any) -> Any:
    """The one-word form, `"del"`, as the dict it stands for; anything else unchanged."""
    return {"method": METHOD} if speculative_config == METHOD else speculative_config


def asks_for_del(speculative_config: Any, spec_method: str | None) -> bool:
    """Whether a user's `speculative_config` (any form) or `--spec-method` names `del` or one of its fields."""
    given = as_fields(speculative_config)
    if not isinstance(given, dict):
        return spec_method == METHOD
    method = given.get("method", spec_method)
    names_a_field = any(key.replace("-", "_").startswith("del_") for key in given)
    return method == METHOD or (method is None and names_a_field)
