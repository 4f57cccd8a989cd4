"""Draft steps as CUDA graphs: replayed, not launched operation by operation.

A step is recorded in stages, one for each segment of layers between candidate exits and one for the LM head, so that
every layer is recorded once for a size of batch, whatever exits a round has in it. Between stages the rows' states lie
in buffers of their own. Recording, memory pool, sizes of batches and the choice of a size are vLLM's own.
"""

import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise

import torch
from vllm.config import CompilationConfig, VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import (
    AttentionState,
    BatchExecutionDescriptor,
    CudaGraphManager,
    prepare_inputs_to_capture,
)
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.utils import AttentionGroup

from vllm_del.draft.head import Head
from vllm_del.draft.network import Layers
from vllm_del.kernels.exit_rows import exit_rows

logger = init_logger(f"vllm.{__name__}")

SPARSE = 1.25
"""Each size of batch that is recorded is so many times the one before it, but powers of two are all: what waits for
weights costs little more for a few rows more. vLLM's own sizes are twice as many, and we record each in stages."""

SPARSEST = 4
"""With many exits each is at most so many times the one before it."""

MOST_GRAPHS = 128
"""No more are recorded, but for one size at least: with many exits every other size is left out, and then the largest.
A number and not a time, as all ranks have to record the same. Meant to keep it below 60 seconds and 1.5 GiB for a model
of 8 billion parameters; what it takes is in the log, and has not been measured yet."""


@dataclass(frozen=True)
class Stage(BatchExecutionDescriptor):
    """A size of batch, and which part of a draft step: a segment of layers, or after the last one the head."""

    index: int = 0


class DraftGraphs(CudaGraphManager):
    """The graphs of draft steps. What they read is in `input_buffers` and `exit`, whatever the number of rows."""

    compilation_config: CompilationConfig

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        cudagraph_mode: CUDAGraphMode,
        segments: Sequence[Callable[..., Layers]],
        head: Head,
        input_buffers: InputBuffers,
        # [max_num_reqs] int64: the segment after which each row leaves
        exit: torch.Tensor,
    ) -> None:
        self._stages = len(segments) + 1
        # A draft step is a decode of one token a row. Layers are recorded with their attention, or not at all.
        full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        mode = CUDAGraphMode.FULL_DECODE_ONLY if full else CUDAGraphMode.NONE
        super().__init__(vllm_config, device, mode, decode_query_len=1)
        self._segments = segments
        self._head = head
        self._input_buffers = input_buffers
        self._exit = exit
        for descs in self._capture_descs.values():
            descs[:] = [Stage(**vars(desc), index=index) for desc in descs for index in range(self._stages)]
        # [rows, hidden size] each, made for the largest batch, which is recorded first
        self._layers: Layers | None = None
        self._seconds, self._bytes = 0.0, 0
        self._token = torch.zeros(self.max_num_reqs, dtype=torch.int64, device=device)
        self._confidence = torch.zeros(self.max_num_reqs, device=device)

    def _init_candidates(self) -> None:
        sizes = sorted(self.compilation_config.cudagraph_capture_sizes or ())
        self.compilation_config = copy(self.compilation_config)
        sizes = thinned([size for size in sizes if size <= self.max_num_reqs], MOST_GRAPHS // self._stages)
        self.compilation_config.cudagraph_capture_sizes = sizes
        super()._init_candidates()

    def capture_stages(
        self,
        model_state: ModelState,
        block_tables: BlockTables,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
    ) -> None:
        """Record every stage for every size of batch, with a progress bar. Overwrites `input_buffers`."""
        begin, free = time.perf_counter(), torch.accelerator.get_memory_info()[0]

        def prepare(desc: BatchExecutionDescriptor, warmup: bool) -> Callable[[CUDAGraphMode], None]:
            assert isinstance(desc, Stage)
            assert desc.num_reqs is not None
            # Anew for each recording: metadata may be used up by a warm-up.
            attention = prepare_inputs_to_capture(
                desc.num_reqs,
                desc.num_tokens,
                model_state,
                self._input_buffers,
                block_tables,
                attn_groups,
                kv_cache_config,
                full_cudagraph=True,
                max_query_len=1,
            )
            return lambda cg_mode: self._run(desc, attention, cg_mode)

        self.capture(prepare, "Capturing draft CUDA graphs")
        self._seconds = time.perf_counter() - begin
        self._bytes = free - torch.accelerator.get_memory_info()[0]

    def log(self) -> None:
        """Say how many there are. vLLM records graphs once before, for a trial: this is of those that serve."""
        if self.graphs:
            logger.info_once(
                "del: %d CUDA graphs of draft steps, for up to %d sequences, took %.1f s and %.0f MiB",
                len(self.graphs),
                max(desc.num_tokens for desc in self.graphs),
                self._seconds,
                self._bytes / 2**20,
            )

    def replay(self, desc: BatchExecutionDescriptor, deepest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A draft step of `desc.num_tokens` rows through the segments up to `deepest`: tokens [rows] int64 and
        probabilities [rows] float32, which the next step writes over."""
        for index in (*range(deepest + 1), len(self._segments)):
            self.run_fullgraph(Stage(**vars(desc), index=index))
        return self._token[: desc.num_tokens], self._confidence[: desc.num_tokens]

    def _run(self, stage: Stage, attention: AttentionState, cg_mode: CUDAGraphMode) -> None:
        rows = stage.num_tokens
        across_dp = torch.full((self.dp_size,), rows, dtype=torch.int32) if self.dp_size > 1 else None
        with set_forward_context(
            attention.attn_metadata,
            self.vllm_config,
            num_tokens=rows,
            cudagraph_runtime_mode=cg_mode,
            num_tokens_across_dp=across_dp,
            slot_mapping=attention.slot_mappings,
            batch_descriptor=BatchDescriptor(num_tokens=rows),
        ):
            if stage.index < len(self._segments):
                self._run_segment(stage.index, rows)
                return
        assert self._layers is not None
        token, confidence = self._head(self._layers[2][:rows])
        self._token[:rows].copy_(token)
        self._confidence[:rows].copy_(confidence)

    def _run_segment(self, index: int, rows: int) -> None:
        positions = self._input_buffers.positions[:rows]
        if index == 0:
            given = self._segments[0](self._input_buffers.input_ids[:rows], positions)
            if self._layers is None:
                hidden_states, residual, states = given
                self._layers = hidden_states.clone(), residual if residual is None else residual.clone(), states.clone()
            self._layers[2][:rows].copy_(given[2])
        else:
            assert self._layers is not None
            hidden_states, residual, states = (kept if kept is None else kept[:rows] for kept in self._layers)
            given = self._segments[index](positions, hidden_states, residual)
            exit_rows(given[2], self._exit[:rows], index, states)
        for kept, value in zip(self._layers[:2], given[:2], strict=True):
            if kept is not None:
                kept[:rows].copy_(value)


def thinned(sizes: Sequence[int], most: int) -> list[int]:
    """Of ascending sizes those that `SPARSE` leaves, and powers of two, and the largest. Of these at most `most`: every
    other one, as long as none is padded to more than `SPARSEST` times as many rows, and then the smallest."""
    kept: list[int] = []
    for size in sizes:
        if not kept or size >= SPARSE * kept[-1] or size & (size - 1) == 0 or size == sizes[-1]:
            kept.append(size)
    while len(kept) > max(1, most):
        fewer = [*kept[:1], *kept[1:][::-2][::-1]]
        if any(more > SPARSEST * less for less, more in pairwise(fewer)):
            return kept[: max(1, most)]
        kept = fewer
    return kept
