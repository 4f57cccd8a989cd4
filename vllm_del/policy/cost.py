"""What the parts of a round cost on this machine, in seconds: tables measured once, and read by number of rows.

A draft step is a fixed part, as many layers as its exit is deep, and the head, each by the number of rows; a
verification goes by its number of tokens. All of it is steady in the number: hardware reads weights once for few rows
and computes for many, in steps of its own, so no formula is fitted; between two measurements the line is straight.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class MeasuredCosts:
    """Seconds, as measured; `rows` and `tokens` ascend. What is saved, and what `vllm-del` prints."""

    rows: tuple[int, ...]
    # by rows: a draft step without its layers and its head, one layer of it, and the head
    step: tuple[float, ...]
    layer: tuple[float, ...]
    head: tuple[float, ...]
    tokens: tuple[int, ...]
    # by tokens: a whole forward with its sampling
    verify: tuple[float, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "MeasuredCosts":
        """Raises `TypeError` or `ValueError` on text that is no such thing."""
        return cls(**{name: tuple(values) for name, values in json.loads(text).items()})


SHADOW_ROWS = 512
"""The head is tabled up to so many rows at least: shadow tokens are scored in larger batches than drafts."""


class CostTables:
    """`MeasuredCosts` for every number of rows and tokens: float64 tensors on the model's device, in seconds."""

    def __init__(self, measured: MeasuredCosts, max_rows: int, max_length: int, device: torch.device) -> None:
        def table(places: Sequence[int], values: Sequence[float], most: int) -> torch.Tensor:
            dense = _dense(places, values, most)
            return torch.tensor(dense, dtype=torch.float64, device=device)

        # [rows + 1] each; of no rows nothing is computed
        self.step = table(measured.rows, measured.step, max_rows)
        self.layer = table(measured.rows, measured.layer, max_rows)
        self.head = table(measured.rows, measured.head, max(max_rows, SHADOW_ROWS))
        # [tokens + 1]
        self.verify = table(measured.tokens, measured.verify, max_rows * (max_length + 1))
        # For the host, which must not wait for the device to know them.
        self._head_seconds = _dense(measured.rows, measured.head, max(max_rows, SHADOW_ROWS))
        self._verify_seconds = _dense(measured.tokens, measured.verify, max_rows * (max_length + 1))

    def verify_seconds(self, tokens: int) -> float:
        """Seconds of a forward over so many tokens; what is beyond the table, a prompt, costs in proportion."""
        last = len(self._verify_seconds) - 1
        return float(self._verify_seconds[min(tokens, last)] * max(1.0, tokens / last))

    def head_seconds(self, rows: int) -> float:
        """Seconds of the head on so many rows, at most `SHADOW_ROWS`."""
        return float(self._head_seconds[rows])

    def head_rows(self, seconds: float) -> int:
        """The most rows that the head does within `seconds`."""
        return int(np.searchsorted(self._head_seconds, seconds, side="right")) - 1


def _dense(places: Sequence[int], values: Sequence[float], most: int) -> np.ndarray:
    """The values at 0 to `most`: [most + 1]; 0 at 0, and beyond the last place in proportion."""
    # Measured noise must not make more work look cheaper: the planner would follow it.
    steady = np.maximum.accumulate(np.maximum(values, 0.0))
    at = np.arange(most + 1)
    dense = np.interp(at, places, steady) * np.maximum(1.0, at / places[-1])
    dense[0] = 0.0
    return dense
