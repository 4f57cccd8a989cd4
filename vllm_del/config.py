"""DelConfig: what a user may say about `del`, its defaults, its validation, and its one-word form.

`DelConfig` is vLLM's `SpeculativeConfig` with a few fields of its own. Inside vLLM its `method` reads
`"draft_model"`: vLLM compares that string where it grants look-ahead KV slots and async scheduling, and both
are right for a drafter that writes KV ahead. `isinstance(config, DelConfig)` is what tells the two apart.
"""

import difflib
import json
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, StrictInt, model_validator
from vllm.config import SpeculativeConfig
from vllm.config.utils import config

from vllm_del.asking import METHOD

DEFAULT_NUM_SPECULATIVE_TOKENS = 6

# Inherited fields that mean for `del` what they mean elsewhere, or that vLLM fills in itself.
_SHARED_FIELDS = frozenset(
    {
        "method",
        "num_speculative_tokens",
        "target_model_config",
        "target_parallel_config",
        "draft_model_config",
        "draft_parallel_config",
    }
)


def _parse_exit_layers(value: Any) -> Any:
    """Accept what JSON, Python and the dotted command line give: 4, "4", "4,8,12", [4, 8, 12], "auto"."""
    if isinstance(value, str) and value != "auto":
        try:
            return [int(part) for part in value.split(",")]
        except ValueError:
            raise ValueError(
                f"del_exit_layers={value!r} is not understood: give 'auto', one depth (4), or several (4,8,12)"
            ) from None
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if value != "auto" and not (isinstance(value, list) and all(type(layer) is int for layer in value)):
        raise ValueError(
            f"del_exit_layers={value!r} is not understood: give 'auto', one depth (4), or several (4,8,12)"
        )
    return value


def _parse_draft_vocab(value: Any) -> Any:
    """Accept a number of tokens, also as text of the dotted command line, or a file."""
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if isinstance(value, bool) or not (value is None or isinstance(value, int | str)):
        raise ValueError(
            f"del_draft_vocab={value!r} is not understood: give a number of tokens, or a file of token ids"
        )
    return value


def read_tokens(file: str, num_tokens: int) -> list[int]:
    """Token ids of `file`: a JSON list, or a list or tensor that torch has saved (.pt), as for SGLang's token maps.

    Raises `ValueError` if they are not distinct tokens of a vocabulary of `num_tokens`.
    """
    name = f"del_draft_vocab={file!r}"
    try:
        if file.endswith(".pt"):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
            tokens = loaded.tolist() if isinstance(loaded, torch.Tensor) else loaded
        else:
            tokens = json.loads(Path(file).read_text())
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror or error}") from None
    except (ValueError, RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(f"{name}: neither JSON nor what torch saves as .pt ({error})") from None
    if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
        raise ValueError(f"{name}: a list of token ids is needed")
    wrong = [token for token in tokens if not 0 <= token < num_tokens]
    if wrong:
        raise ValueError(f"{name}: token {wrong[0]} is not in the model's vocabulary of {num_tokens}")
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"{name}: it has {len(tokens) - len(set(tokens))} tokens twice")
    return tokens


def _number(field: str, kind: type[int] | type[float], least: int, most: int) -> BeforeValidator:
    """A number within bounds, also as text of the dotted command line. `true` would count as 1, and is none."""

    def parse(value: Any) -> int | float:
        with suppress(TypeError, ValueError, OverflowError):
            number = kind(value)
            if not isinstance(value, bool) and least <= number <= most and number == float(value):
                return number
        raise ValueError(f"{field}={value!r}: give a {'whole ' * (kind is int)}number from {least} to {most}")

    return BeforeValidator(parse)


@config
class DelConfig(SpeculativeConfig):
    """Self-speculation: the target's first layers, its final norm and its LM head draft.

    Raises a pydantic `ValidationError`, naming the field, on a value that cannot work.
    """

    method: Literal["del", "draft_model"] = "del"
    """Always `"del"` for a user; `"draft_model"` afterwards, see the module's docstring."""
    num_speculative_tokens: Annotated[int, _number("num_speculative_tokens", int, 1, 64)] = (
        DEFAULT_NUM_SPECULATIVE_TOKENS
    )
    """The largest number of tokens drafted for a sequence in one round."""
    del_exit_layers: Annotated[Literal["auto"] | list[StrictInt], BeforeValidator(_parse_exit_layers)] = "auto"
    """The depths (number of layers run, 1 to L - 1) that drafts may leave at. `"auto"` takes an eighth, a fifth, a
    third and a half of the model's depth, as far as these are two layers apart; with `del_policy: "fixed"` a fifth,
    but 4 layers, or half of a shallower model, at least. `del_policy: "fixed"` takes one depth."""
    del_policy: Literal["dynamic", "fixed"] = "dynamic"
    """How the exit layer and the draft length are chosen. `"dynamic"`: for each sequence in each round, from what was
    accepted and what a round costs. `"fixed"`: always the same ones."""
    del_objective: Literal["goodput", "tpl"] = "goodput"
    """What the dynamic policy makes large. `"goodput"`: expected tokens of the whole batch over the measured time of
    the round. `"tpl"`: the DEL paper's tokens per layer, where drafts are ended by confidence alone."""
    del_shadow_budget: Annotated[float, _number("del_shadow_budget", float, 0, 1)] = 0.02
    """What the dynamic policy may spend on asking exits that did not draft what they would have said, as a share of
    the time of verification."""

    del_draft_vocab: Annotated[int | str | None, BeforeValidator(_parse_draft_vocab)] = None
    """The tokens that drafts are made of, for a cheaper LM head: so many, those generated most often so far; or those
    of a file (JSON or `.pt`, a list of ids). `None` for all. Output does not depend on it: verification has all."""
    del_draft_head: Literal["auto", "model", "fp8"] = "auto"
    """The LM head that drafts go through. `"model"`: the model's own. `"fp8"`: a copy in FP8, half the bytes of
    bfloat16. `"auto"`: that copy where the GPU has FP8 and it takes less than a hundredth of the model's memory."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, given: Any) -> Any:
        """Pydantic's own message for an unknown field would not say what is accepted."""
        known, accepted = {field.name for field in fields(cls)}, cls._accepted()
        for name, value in (getattr(given, "kwargs", None) or {}).items():
            if name not in known:
                close = difflib.get_close_matches(name, accepted, n=1)
                hint = f" Did you mean {close[0]}?" if close else ""
                raise ValueError(f"{name}={value!r} is no field of method 'del'.{hint} Accepted: {', '.join(accepted)}")
        return given

    def __post_init__(self) -> None:
        if self.method != METHOD:
            raise ValueError(f"method={self.method!r}: a DelConfig takes method 'del' only")
        if self.target_model_config is None:
            raise ValueError("target_model_config is None: vLLM fills it in; build DelConfig through EngineArgs")
        self._reject_foreign_fields()
        depth = self.target_model_config.get_total_num_hidden_layers()
        self.del_exit_layers = _resolve_exit_layers(self.del_exit_layers, depth, self.is_dynamic)

        self._check_draft_vocab(self.target_model_config.get_vocab_size())

        self.method = "draft_model"
        self.model = self.target_model_config.model
        self.draft_model_config = self.target_model_config
        self.draft_parallel_config = self.target_parallel_config
        self.draft_tensor_parallel_size = self.target_parallel_config.tensor_parallel_size
        if self.is_dynamic:
            # vLLM's own way to say which hidden states the target hands out: after each exit, and after all layers.
            self.target_model_config.hf_config.eagle_aux_hidden_state_layer_ids = [*self.exits, depth]

    def compute_hash(self) -> str:
        """What vLLM names compiled code by: with the exits, as each has a graph of its own."""
        return f"{super().compute_hash()} exits {self.del_exit_layers}"

    @property
    def is_dynamic(self) -> bool:
        """Whether exits and lengths are chosen while serving."""
        return self.del_policy == "dynamic"

    @property
    def exits(self) -> list[int]:
        """The depths at which drafts may leave, ascending."""
        assert isinstance(self.del_exit_layers, list)
        return sorted(self.del_exit_layers)

    @property
    def max_num_new_slots_for_drafting(self) -> int:
        """0: a draft step feeds one token a sequence, in the place the verification left free."""
        return 0

    def _check_draft_vocab(self, num_tokens: int) -> None:
        listed = self.del_draft_vocab
        if isinstance(listed, str):
            read_tokens(listed, num_tokens)
        elif listed is not None and not 1 <= listed < num_tokens:
            raise ValueError(
                f"del_draft_vocab={listed}: give 1 to {num_tokens - 1} tokens (the model has {num_tokens}), "
                "or leave it out"
            )

    @classmethod
    def _accepted(cls) -> list[str]:
        """The fields a user may give."""
        own = sorted(field.name for field in fields(cls) if field.name.startswith("del_"))
        return ["method", "num_speculative_tokens", *own]

    def _reject_foreign_fields(self) -> None:
        """Refuse fields of other speculative methods, which would silently do nothing here."""
        for field in fields(self):
            if field.name in _SHARED_FIELDS or field.name.startswith("del_"):
                continue
            value = getattr(self, field.name)
            if field.default is not MISSING and value != _plain_default(field.default):
                raise ValueError(
                    f"{field.name}={value!r} has no meaning for method 'del' (the target model drafts for "
                    f"itself): leave it out. Accepted: {', '.join(self._accepted())}"
                )

    def __repr__(self) -> str:
        return (
            f"DelConfig(method='del', num_speculative_tokens={self.num_speculative_tokens}, "
            f"del_exit_layers={self.del_exit_layers}, del_policy={self.del_policy!r}, "
            f"del_objective={self.del_objective!r}, del_shadow_budget={self.del_shadow_budget}, "
            f"del_draft_vocab={self.del_draft_vocab!r}, del_draft_head={self.del_draft_head!r})"
        )


def _plain_default(default: Any) -> Any:
    """The value behind a dataclass default that may be a pydantic `Field`."""
    return getattr(default, "default", default)


def _resolve_exit_layers(wanted: Literal["auto"] | list[int], depth: int, dynamic: bool) -> list[int]:
    """`wanted` as a list of distinct depths in [1, depth - 1]."""
    if depth < 2:
        raise ValueError(f"method='del' needs a model of at least 2 layers; this one has {depth}")
    if wanted == "auto" and dynamic:
        # A few, as each is asked what it would say, and some layers apart, as each ends a graph. Deeper than half, a
        # draft can hardly pay.
        exits = [max(1, depth // 2)]
        for part in (3, 5, 8):
            if exits[0] - round(depth / part) >= 2 and round(depth / part):
                exits.insert(0, round(depth / part))
        return exits
    if wanted == "auto":
        # A fifth is what LayerSkip's authors draft with, more or less. Copying from the context takes a few layers
        # however deep the model is, and text that repeats itself is where drafts are accepted most.
        return [max(1, round(depth / 5), min(4, depth // 2))]
    wrong = [layer for layer in wanted if not 1 <= layer < depth]
    if wrong or not wanted:
        raise ValueError(
            f"del_exit_layers={wanted!r}: give depths from 1 to {depth - 1} (the model has {depth} layers), or 'auto'"
        )
    if not dynamic and len(wanted) > 1:
        raise ValueError(f"del_exit_layers={wanted!r}: del_policy='fixed' drafts at one depth; give one")
    return list(dict.fromkeys(wanted))
