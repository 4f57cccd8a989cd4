"""Per-row bookkeeping between draft steps: what was said, who stops, next input, position, sequence length, KV slot."""

from vllm_del.kernels.backend import by_device

from . import reference
from .reference import NO_TOKEN, PAD_SLOT, Said

__all__ = ["NO_TOKEN", "PAD_SLOT", "Said", "advance_rows"]

advance_rows = by_device(reference.advance_rows)
