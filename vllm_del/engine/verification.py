"""Verifications on Model Runner V2: graphs for drafts of any lengths, and made-up ones for the measurement of costs."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.attn_utils import get_varlen_cudagraph_unsupported_backend
from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

logger = init_logger(f"vllm.{__name__}")


def record_any_lengths(runner: "GPUModelRunner", cudagraph_mode: CUDAGraphMode) -> None:
    """Have the target's graphs of decodes be for rows of any lengths up to the longest, where attention can do it.

    Called before they are recorded. As vLLM makes them without its adaptive verification, they are for rows of the
    longest length alone: a round in which rows draft less, or nothing, would run without.
    """
    if cudagraph_mode.decode_mode() != CUDAGraphMode.FULL or not cudagraph_mode.separate_routine():
        return
    unsupported = get_varlen_cudagraph_unsupported_backend(
        runner.attn_groups, runner.vllm_config, runner.decode_query_len
    )
    if unsupported is not None:
        logger.info_once(
            "del: %s replays no graphs for drafts of different lengths: rounds that have some run without one",
            unsupported[0],
        )
        return
    runner.cudagraph_manager = ModelCudaGraphManager(
        runner.vllm_config,
        runner.device,
        cudagraph_mode,
        decode_query_len=runner.decode_query_len,
        lora_capture_cases=runner.lora_capture_cases,
        varlen_decode=True,
        ubatch_runner=runner.ubatch_runner,
    )


def run_made_up(
    runner: "GPUModelRunner",
    # of hidden states, [tokens, hidden size]
    compute_logits: Callable[[torch.Tensor], torch.Tensor],
    lengths: list[int],
    context: int,
) -> float | None:
    """A forward over rows of so many tokens each, after `context` tokens, as the runner's own dummy steps are, and so
    by the graphs that it has, with its logits and their argmax.

    Seconds, by vLLM's own stopwatch for such steps: the host's clock would have in it what the host does meanwhile in
    service. None where the host is the device.
    """
    clock = runner.step_timing
    with clock.collect() if runner.device.type != "cpu" else nullcontext([]) as timings:
        compute_logits(_hidden_states(runner, lengths, context)).argmax(-1)
        for done in (clock.forward_end, clock.drafter_start, clock.drafter_end):
            done()
    return timings[0].forward_ms / 1e3 if timings else None


def _hidden_states(runner: "GPUModelRunner", lengths: list[int], context: int) -> torch.Tensor:
    """Of such a forward, [tokens, hidden size]."""
    tokens, alike = sum(lengths), len({*lengths}) == 1
    batch = runner.cudagraph_manager.dispatch(
        len(lengths), tokens, lengths[0] if alike else None, num_active_loras=0, max_query_len=max(lengths)
    )
    # It has as many rows as the graph was recorded with, and tokens shared out among them: so much context in all.
    context = context * len(lengths) // (batch.num_reqs or len(lengths))
    step = SchedulerOutput.make_empty()
    step.num_scheduled_tokens = {f"_del_{row}": length for row, length in enumerate(lengths)}
    step.total_num_scheduled_tokens = tokens
    runner.kv_connector.set_disabled(True)
    try:
        runner.execute_model(step, dummy_run=True, context_len=context)
    finally:
        runner.kv_connector.set_disabled(False)
    state, runner.execute_model_state = runner.execute_model_state, None
    return state.hidden_states[:tokens]
