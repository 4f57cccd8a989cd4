"""Per-row bookkeeping of a draft step: next position, sequence length and KV slot."""

from vllm_del.kernels.backend import by_device

from . import reference
from .reference import PAD_SLOT

__all__ = ["PAD_SLOT", "advance_rows"]

advance_rows = by_device(reference.advance_rows)
