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
