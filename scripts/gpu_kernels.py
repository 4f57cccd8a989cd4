"""The part of gpu_parts.py that needs no model: what the LM head of a draft step costs, and a copy on the device."""

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY, HIDDEN, SHORTLIST = 128_256, 4096, 32_768
ROWS = (16, 8, 4, 2, 1)
"""The most first, as kernels are tuned by the first call."""
MORE_ROWS = (128, 512, 64, 32)
"""Rows of shadow bursts and of large batches, for which nothing was asked. Those of 512 go by the blocks that were
chosen for 128, as in a server."""


def exit_head(_given: dict[str, Any]) -> dict[str, Any]:
    """The kernel beside what torch makes of the same, eager and compiled, on the head of an 8B model."""
    from triton.testing import do_bench
    from vllm_del.kernels.exit_head import exit_head

    from vllm_del.draft.head import quantise

    def in_torch(states: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = (states @ weight.T).float()
        return logits.argmax(-1), logits.logsumexp(-1)

    def milliseconds(run: Callable[[], Any]) -> float:
        return do_bench(run, return_mode="median")

    weight = torch.randn(VOCABULARY, HIDDEN, device=DEVICE, dtype=torch.bfloat16) * 0.02
    shortlist = torch.randperm(VOCABULARY, device=DEVICE)[:SHORTLIST].sort().values
    in_fp8 = None
    if torch.cuda.get_device_capability() >= (8, 9):
        in_fp8 = torch.empty(weight.shape, device=DEVICE, dtype=torch.float8_e4m3fn)
        scales = torch.empty(VOCABULARY, device=DEVICE)
        quantise(weight, None, in_fp8, scales)
    speed, rows = copy_bandwidth(), {}
    for number in MORE_ROWS + ROWS:
        states = torch.randn(number, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
        ours = milliseconds(partial(exit_head, states, weight))
        eager = milliseconds(partial(in_torch, states, weight))
        # Else the last of so many shapes would not be compiled any more.
        torch.compiler.reset()
        fused = milliseconds(partial(torch.compile(in_torch, dynamic=False), states, weight))
        short = milliseconds(partial(exit_head, states, weight, shortlist=shortlist))
        rows[str(number)] = {
            "milliseconds": ours,
            "torch_eager": eager,
            "torch_compiled": fused,
            "shortlist": short,
            "share_of_bandwidth": weight.nbytes / (ours / 1e3) / speed,
            "over_torch": min(eager, fused) / ours,
            "shortlist_over_whole": short / ours,
        }
        if in_fp8 is not None:
            fp8 = milliseconds(partial(exit_head, states, in_fp8, row_scales=scales))
            rows[str(number)] |= {"fp8": fp8, "fp8_over_whole": fp8 / ours}
    asked, more = ({str(number): rows[str(number)] for number in of} for of in (ROWS, MORE_ROWS))
    return {"device": torch.cuda.get_device_name(), "copy_bandwidth": speed, "rows": asked, "more_rows": more}


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    source = torch.zeros(1 << 30 if DEVICE == "cuda" else 1 << 26, dtype=torch.uint8, device=DEVICE)
    to, seconds = torch.empty_like(source), []
    if DEVICE == "cuda":
        from triton.testing import do_bench

        # By the device's clock, as kernels are.
        return 2 * source.nbytes / (do_bench(lambda: to.copy_(source), return_mode="median") / 1e3)
    for _ in range(12):
        begin = time.perf_counter()
        to.copy_(source)
        seconds.append(time.perf_counter() - begin)
    return 2 * source.nbytes / median(seconds[2:])
