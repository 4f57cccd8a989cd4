"""Run vLLM's Triton kernels, and so its Model Runner V2, in Triton's interpreter on a CPU."""

import os
from types import SimpleNamespace


class _NoDriver:
    """Stands where a driver would: the interpreter needs none."""

    @staticmethod
    def is_active() -> bool:
        return False


def use_triton_interpreter() -> None:
    """Call before vLLM is imported. vLLM's CPU build uses Triton only where Triton lists a backend `cpu`."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(compiler=None, driver=_NoDriver)


def avoid_uninterpretable_kernels() -> None:
    """Call after vLLM is imported: its fused top-k/top-p kernel does arithmetic the interpreter lacks.

    vLLM's own torch version of it takes its place.
    """
    from vllm.v1.sample.ops import topk_topp_sampler as ops

    ops.apply_top_k_top_p_triton = ops.apply_top_k_top_p_pytorch
