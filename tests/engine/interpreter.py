"""Run vLLM's Triton kernels, and so its Model Runner V2, in Triton's interpreter on a CPU."""

import os
from types import SimpleNamespace
from typing import Any

from tests.engine.quick_interpreter import make_it_quick


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
    make_it_quick()
    _multiply_bfloat16()
    _take_any_mask()


def _multiply_bfloat16() -> None:
    """The interpreter holds bfloat16 as whole numbers of 16 bits, and its `tl.dot` would multiply these."""
    import numpy
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot


def _take_any_mask() -> None:
    """The interpreter may hold what is true or false as whole numbers, and then takes them for no mask."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def true_or_false(mask: Any) -> Any:
        return mask if mask.data.dtype == bool else TensorHandle(mask.data.astype(bool), mask.dtype)

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        return load(self, ptrs, true_or_false(mask), *rest, **options)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        return store(self, ptrs, value, true_or_false(mask), *rest, **options)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = (
        create_masked_load,
        create_masked_store,
    )


def allow_triton_attention() -> None:
    """Call after vLLM is imported: `attention_backend="TRITON_ATTN"` gives attention as GPUs have it.

    The CPU's own backend builds its metadata on the host, for one step: it fits no graph.
    """
    import torch
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    choose = CpuPlatform.get_attn_backend_cls

    def choose_ours(cls: type, selected: Any, *args: Any, **kwargs: Any) -> str:
        if selected == AttentionBackendEnum.TRITON_ATTN:
            return AttentionBackendEnum.TRITON_ATTN.get_path()
        return choose(selected, *args, **kwargs)

    if choose.__name__ != choose_ours.__name__:
        CpuPlatform.get_attn_backend_cls = classmethod(choose_ours)
        # It asks, to size its blocks.
        torch.cuda.get_device_capability = lambda device=None: (9, 0)


def avoid_uninterpretable_kernels() -> None:
    """Call after vLLM is imported: its fused top-k/top-p kernel does arithmetic the interpreter lacks.

    vLLM's own torch version of it takes its place.
    """
    from vllm.v1.sample.ops import topk_topp_sampler as ops

    ops.apply_top_k_top_p_triton = ops.apply_top_k_top_p_pytorch


def read_the_head_in_large_blocks() -> None:
    """The interpreter's time goes by operations, not by what is in them. Small blocks are tested in tests/kernels."""
    from vllm_del.kernels.exit_head import triton

    triton.SHAPES[0].kwargs.update(BLOCK_TOKENS=1024, BLOCK_BYTES=1024)
    triton.LEAST_TOKENS = 1024
