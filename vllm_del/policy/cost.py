"""What the parts of a round cost on this machine, in seconds: tables measured once, and read by number of rows.

A draft step is a fixed part, as many layers as its exit is deep, and the head, these by the number of rows; a
verification goes by its number of tokens. All of it is steady in the number: hardware reads weights once for few rows
and computes for many, in steps of its own, so no formula is fitted; between two measurements the line is straight.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

Times = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class MeasuredCosts:
    """Seconds, as measured; `rows` and `tokens` ascend. What is saved, and what `vllm-del` prints."""

    # a draft step without its layers and its head, whatever the number of rows; and by rows, one layer of it
    step: float
    rows: tuple[int, ...]
    layer: tuple[float, ...]
    head_rows: tuple[int, ...]
    # by rows of its own, as it also scores shadow tokens
    head: tuple[float, ...]
    tokens: tuple[int, ...]
    # by tokens: a whole forward with its sampling, of rows of `verify_each` tokens
    verify: tuple[float, ...]
    verify_each: int = 1
    # All of it with a context of so many tokens in each row. A token more of it costs: in one layer of a draft step, in
    # a verification, and there once more for each draft of the row.
    context: int = 0
    layer_context: float = 0.0
    verify_context: float = 0.0
    token_context: float = 0.0
    # beyond the table: what a verification of several rows takes more where these have different lengths
    uneven: float = 0.0

    def with_uneven(self, seconds: float) -> "MeasuredCosts":
        """The same, where that is in the table at every place of rows that have different lengths."""
        verify = [
            max(taken - seconds, taken / 10) if number > self.verify_each and number % self.verify_each else taken
            for number, taken in zip(self.tokens, self.verify, strict=True)
        ]
        return replace(self, verify=tuple(verify), uneven=seconds)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "MeasuredCosts":
        """Raises `ValueError` on text that is no such thing."""
        try:
            saved = json.loads(text).items()
            tables: dict[str, Any] = {
                name: tuple(values) if isinstance(values, list) else values for name, values in saved
            }
            costs = cls(**tables)
        except (AttributeError, TypeError) as error:
            raise ValueError(str(error)) from None
        for places, name in (("rows", "layer"), ("head_rows", "head"), ("tokens", "verify")):
            where = tables[places]
            if (
                not isinstance(where, tuple)
                or not where
                or any(type(n) is not int or n < 1 for n in where)
                or list(where) != sorted(set(where))
            ):
                raise ValueError(f"{places}={where} does not ascend from 1")
            if len(tables[name]) != len(where) or not all(type(n) is float and n > 0 for n in tables[name]):
                raise ValueError(f"{name}={tables[name]} is not one time for each of {places}={where}")
        scalars = ("step", "layer_context", "verify_context", "token_context", "uneven")
        if wrong := [name for name in scalars if type(getattr(costs, name)) is not float or getattr(costs, name) < 0]:
            raise ValueError(f"{wrong} are not times")
        return costs


def split_steps(shallow: Times, deep: Times, exits: Sequence[int]) -> tuple[float, list[float]]:
    """The fixed part of draft steps and what one layer adds, by rows, of steps to the first of `exits` and to the last.

    The fixed part is one number: a difference of two close times is mostly noise, and its median less so. The layers
    then account for all of the deep steps.
    """
    first, last = exits[0], exits[-1]
    short, long = _steady(shallow), _steady(deep)
    if first == last:
        return 0.0, (long / last).tolist()
    fixed = np.median(short - first * (long - short) / (last - first))
    # At least a tenth of a step is its layers, whatever was measured: without any the deepest exit would look free.
    step = float(np.clip(fixed, 0.0, 0.9 * long[0]))
    return step, ((long - step) / last).tolist()


@dataclass
class Correction:
    """What the clock says of the tables while serving."""

    # factors of what is in them: of draft steps, and of verification
    draft: float = 1.0
    verify: float = 1.0
    # what a round takes beside its drafts and a forward pass, seconds: scheduling, sampling and output, whatever the
    # number of drafts; and what each draft step takes beside its layers and the head, whatever the exit
    overhead: float = 0.0
    step: float = 0.0


SHADOW_ROWS = 512
"""The head is tabled up to so many rows at least: shadow tokens are scored in larger batches than drafts."""


class CostTables:
    """`MeasuredCosts` for every number of rows and tokens: float64 tensors on the model's device, in seconds.

    What a row's context costs is apart from the tables: `layer_context` a token of it and layer of a draft step,
    `verify_context` in a verification, `token_context` there for each draft. The tables of draft steps have a context
    of `context` tokens in them, that of verification none, as that is of fewer rows than a round has. Apart is also
    what a verification of several rows takes more where any of them has drafted, as if they never drafted alike.
    """

    def __init__(self, measured: MeasuredCosts, max_rows: int, max_length: int, device: torch.device) -> None:
        self.measured = measured
        # Known while serving only; all that read these tables go by it.
        self.correction = Correction()

        def table(places: Sequence[int], values: Sequence[float], most: int) -> torch.Tensor:
            dense = _dense(places, values, most)
            return torch.tensor(dense, dtype=torch.float64, device=device)

        # [rows + 1] each; of no rows nothing is computed
        self.step = torch.full((max_rows + 1,), measured.step, dtype=torch.float64, device=device)
        self.step[0] = 0.0
        self.layer = table(measured.rows, measured.layer, max_rows)
        self.head = table(measured.head_rows, measured.head, max(max_rows, SHADOW_ROWS))
        # [tokens + 1]
        self.context = measured.context
        # No more than there is in the table: a difference of noisy times may say so.
        of_layers = min(seconds / rows for rows, seconds in zip(measured.rows, measured.layer, strict=True))
        self.layer_context = min(measured.layer_context, 0.9 * of_layers / max(1, measured.context))
        self.verify_context, self.token_context = measured.verify_context, measured.token_context
        of_context = measured.verify_context * measured.context / measured.verify_each
        verify = [max(0.0, v - of_context * n) for n, v in zip(measured.tokens, measured.verify, strict=True)]
        self.verify = table(measured.tokens, verify, max_rows * (max_length + 1))
        # For the host, which must not wait for the device to know them.
        self._layer_seconds = _dense(measured.rows, measured.layer, max_rows)
        self._head_seconds = _dense(measured.head_rows, measured.head, max(max_rows, SHADOW_ROWS))
        self._verify_seconds = _dense(measured.tokens, verify, max_rows * (max_length + 1))

    def draft_seconds(self, rows: int, depth: int, contexts: float) -> float:
        """Seconds of a draft step through `depth` layers, of rows whose context lengths add up to `contexts`."""
        rows = min(rows, len(self._layer_seconds) - 1)
        layer = self._layer_seconds[rows] + self.layer_context * (contexts - rows * self.context)
        return float(self.measured.step + depth * layer + self._head_seconds[rows])

    def round_seconds(self, rows: int, tokens: int, contexts: float) -> float:
        """Seconds of a verification of `tokens`, drafts and the last token of each of the rows."""
        of_drafts = self.token_context * (tokens - rows) * (contexts / rows - self.context)
        return self.verify_seconds(tokens, contexts) + of_drafts + self.uneven(rows) * (tokens > rows)

    def uneven(self, rows: int) -> float:
        """Seconds that a verification of so many rows takes more where any of them has drafted."""
        return self.measured.uneven if rows > 1 else 0.0

    def verify_seconds(self, tokens: int, contexts: float = 0.0) -> float:
        """Seconds of a forward over so many tokens, of rows whose context lengths add up to `contexts`.

        What is beyond the table, a prompt, costs in proportion.
        """
        last = len(self._verify_seconds) - 1
        of_tokens = self._verify_seconds[min(tokens, last)] * max(1.0, tokens / last)
        return float(of_tokens + self.verify_context * contexts)

    def head_seconds(self, rows: int) -> float:
        """Seconds of the head on so many rows, at most `SHADOW_ROWS`."""
        return float(self._head_seconds[rows])

    def head_rows(self, seconds: float) -> int:
        """The most rows that the head does within `seconds`."""
        return int(np.searchsorted(self._head_seconds, seconds, side="right")) - 1


def _dense(places: Sequence[int], values: Sequence[float], most: int) -> np.ndarray:
    """The values at 0 to `most`: [most + 1]; 0 at 0, and beyond the last place in proportion."""
    at = np.arange(most + 1)
    dense = np.interp(at, places, _steady(values)) * np.maximum(1.0, at / places[-1])
    dense[0] = 0.0
    return dense


def _steady(seconds: Times) -> np.ndarray:
    """Times of growing work, as they would be without what else the machine did.

    That only ever adds to a measured time: what more work was done in, less is done in too. And more work must not look
    cheaper, as the planner would follow it.
    """
    return np.minimum.accumulate(np.asarray(seconds)[::-1])[::-1]
