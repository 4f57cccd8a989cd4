"""Rows that leave after a segment of layers, taken out of those that go on."""

from vllm_del.kernels.backend import by_device

from . import reference

__all__ = ["exit_rows"]

exit_rows = by_device(reference.exit_rows)
