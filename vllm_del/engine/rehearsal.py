"""The forward passes of a round over made-up rows, for the measurement of what they cost."""

from collections.abc import Callable, Sequence

import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer, init_attn_backend

from vllm_del.draft.head import ExitHead
from vllm_del.draft.loop import run_segments
from vllm_del.draft.network import EarlyExitNetwork, Layers
from vllm_del.kernels.advance_rows import PAD_SLOT

CONTEXT, LONG_CONTEXT = 256, 2048
"""The context lengths of made-up rows, where the model allows as much."""


class Rehearsal:
    """Each call is complete when it returns. Made-up rows read any blocks and write none."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        network: EarlyExitNetwork,
        segments: Sequence[Callable[..., Layers]],
        head: ExitHead,
        draft_layers: set[str],
        kv_cache_config: KVCacheConfig,
        # blocks in a row of each KV cache group's block table
        table_widths: Sequence[int],
        device: torch.device,
    ) -> None:
        self._config = vllm_config
        self._network = network
        self._segments = segments
        self._head = head
        self._kv_cache_config = kv_cache_config
        self._widths = table_widths
        self._device = device
        # Groups of its own: those in service keep state between steps.
        self._target_groups, _, _ = init_attn_backend(kv_cache_config, vllm_config, device)
        self._draft_groups, _, _ = init_attn_backend(
            kv_cache_config, vllm_config, device, active_layer_names=draft_layers
        )
        max_model_len = vllm_config.model_config.max_model_len
        budget = vllm_config.scheduler_config.max_num_batched_tokens
        self.verify_each = max(1, min(1 + vllm_config.num_speculative_tokens, budget, max_model_len - 1))
        most = max(1, max_model_len - self.verify_each)
        self.context, self.long_context = min(CONTEXT, most), min(LONG_CONTEXT, most)

    @torch.inference_mode()
    def draft_step(self, rows: int, segments: int, context: int) -> None:
        """One draft step through the first `segments` segments, without the head."""
        self._forward(
            rows,
            1,
            context,
            self._draft_groups,
            lambda input_ids, positions: run_segments(self._segments[:segments], input_ids, positions),
        )
        self._wait()

    @torch.inference_mode()
    def head(self, rows: int) -> None:
        """The head on so many rows."""
        hidden_size, dtype = self._config.model_config.get_hidden_size(), self._config.model_config.dtype
        self._head(torch.zeros(rows, hidden_size, dtype=dtype, device=self._device))
        self._wait()

    @torch.inference_mode()
    def verify(self, tokens: int, each: int, context: int) -> None:
        """A forward of the whole model with its logits and their argmax, over rows of `each` tokens."""

        def run(input_ids: torch.Tensor, positions: torch.Tensor) -> None:
            output = self._network.target(
                input_ids=input_ids, positions=positions, intermediate_tensors=None, inputs_embeds=None
            )
            hidden_states = output[0] if isinstance(output, tuple) else output
            self._network.target.compute_logits(hidden_states).argmax(-1)

        self._forward(tokens, min(tokens, each), context, self._target_groups, run)
        self._wait()

    def _forward(
        self,
        tokens: int,
        each: int,
        context: int,
        groups: list,
        run: Callable[[torch.Tensor, torch.Tensor], object],
    ) -> None:
        """`run(input_ids, positions)` in a forward context of rows with `each` query tokens, the last with the rest."""
        rows = -(-tokens // each)
        starts = torch.arange(rows + 1, dtype=torch.int32).mul_(each).clamp_max_(tokens)
        slots = torch.full((len(self._widths), tokens), PAD_SLOT, device=self._device)
        seq_lens = torch.full((rows,), context + each, dtype=torch.int32)
        metadata = build_attn_metadata(
            attn_groups=groups,
            num_reqs=rows,
            num_tokens=tokens,
            query_start_loc_gpu=starts.to(self._device),
            query_start_loc_cpu=starts,
            max_query_len=each,
            seq_lens=seq_lens.to(self._device),
            max_seq_len=context + each,
            block_tables=[self._block_table(rows, width) for width in self._widths],
            slot_mappings=slots,
            kv_cache_config=self._kv_cache_config,
            seq_lens_cpu_upper_bound=seq_lens,
        )
        input_ids = torch.zeros(tokens, dtype=torch.int32, device=self._device)
        positions = torch.full((tokens,), context, device=self._device)
        slot_mapping = build_slot_mappings_by_layer(slots, self._kv_cache_config)
        with set_forward_context(metadata, self._config, num_tokens=tokens, slot_mapping=slot_mapping):
            run(input_ids, positions)

    def _block_table(self, rows: int, width: int) -> torch.Tensor:
        """Blocks that differ as far as there are as many: reading one over and over would be too fast."""
        blocks = torch.arange(rows * width, dtype=torch.int32, device=self._device)
        return (blocks % self._kv_cache_config.num_blocks).view(rows, width)

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
