"""Whether an exit would have said what the target said, at many places: the sweep of `exit_head`, and a comparison."""

from vllm_del.kernels.backend import by_device

from . import reference

__all__ = ["shadow_agree"]

shadow_agree = by_device(reference.shadow_agree)
