"""`--speculative-config del` and `--spec-method del`, and the refusal on a vLLM that is not supported.

Kept apart from the ledger of patches because this is all that an unsupported vLLM gets: it touches `EngineArgs` only.
"""

import json
from collections.abc import Callable
from typing import Any

from vllm.engine.arg_utils import EngineArgs

from vllm_del.asking import METHOD, as_fields, asks_for_del
from vllm_del.engine.wrap import wrap


def accept_del(original: Callable, parser: Any) -> Any:
    """[registry] Why: vLLM parses the first flag as JSON, and the second against its own Literal of methods."""
    parser = original(parser)
    for action in parser._actions:
        if "--speculative-config" in action.option_strings:
            action.type = _word_or_json
            if action.help and METHOD not in action.help.split():
                action.help += " Or the word del : the model drafts for itself (vllm-del)."
        elif "--spec-method" in action.option_strings and METHOD not in (action.choices or [METHOD]):
            action.choices = [*action.choices, METHOD]
    return parser


def _word_or_json(text: str) -> Any:
    """The value of `--speculative-config`: the bare word, JSON, or nothing for "" and "None"."""
    if text in ("", "None"):
        return None
    return as_fields(text) if text == METHOD else json.loads(text)


# What argparse calls the type in its message about a value that is neither.
_word_or_json.__name__ = "'del' or JSON"


def apply_refusal(reason: str) -> None:
    """For a vLLM outside the supported range: asking for `del` raises `reason`; all else is untouched."""

    def refuse(original: Callable, self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        if asks_for_del(getattr(self, "speculative_config", None), getattr(self, "spec_method", None)):
            raise ValueError(reason)
        return original(self, *args, **kwargs)

    wrap(EngineArgs, "add_cli_args", accept_del)
    wrap(EngineArgs, "create_engine_config", refuse)
