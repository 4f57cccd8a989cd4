"""Per-row bookkeeping of a draft step: next position, sequence length and KV slot."""

from .reference import PAD_SLOT, advance_rows

__all__ = ["PAD_SLOT", "advance_rows"]
