"""Verifications on Model Runner V2: graphs for drafts of several lengths; made-up ones, to measure what they cost."""

from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.attn_utils import get_varlen_cudagraph_unsupported_backend
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

logger = init_logger(f"vllm.{__name__}")


class EvenGraphs(ModelCudaGraphManager):
    """The target's graphs of decodes for rows that are all of one length: of one token, or of the longest, and for a
    single row of any between."""

    decode_query_len: int
    _capture_descs: dict[CUDAGraphMode, list[BatchExecutionDescriptor]]

    def _init_candidates(self) -> None:
        longest = self.decode_query_len
        recorded: defaultdict[CUDAGraphMode, list[BatchExecutionDescriptor]] = defaultdict(list)
        for length in range(1, longest + 1):
            # vLLM's own choice for rows of this length; what it chose for others stays among the candidates.
            self.decode_query_len, self._capture_descs = length, {}
            super()._init_candidates()
            for mode, descs in self._capture_descs.items():
                recorded[mode] += (desc for desc in descs if length in (1, longest) or desc.num_reqs == 1)
        # Batches with prompts in them are of no length, and in each choice.
        self._capture_descs = {
            mode: sorted(dict.fromkeys(descs), key=lambda desc: desc.num_tokens, reverse=True)
            for mode, descs in recorded.items()
        }
        kept = {desc for descs in recorded.values() for desc in descs}
        for descs in self._candidates.values():
            whole_first = sorted(dict.fromkeys(descs), key=lambda desc: desc.cg_mode != CUDAGraphMode.FULL)
            descs[:] = [desc for desc in whole_first if desc in kept]


def record_decodes(runner: "GPUModelRunner", cudagraph_mode: CUDAGraphMode) -> None:
    """Have the target's graphs of decodes be for rows of any lengths up to the longest, where attention can do it, and
    else for more lengths than one.

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
            "del: %s replays no whole graph for rows of different lengths: there are some for a single row, and for "
            "rows that all draft nothing or the most; other rounds run as vLLM runs prompts",
            unsupported[0],
        )
    make, varlen_decode = (ModelCudaGraphManager, True) if unsupported is None else (EvenGraphs, False)
    runner.cudagraph_manager = make(
        runner.vllm_config,
        runner.device,
        cudagraph_mode,
        decode_query_len=runner.decode_query_len,
        lora_capture_cases=runner.lora_capture_cases,
        varlen_decode=varlen_decode,
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
