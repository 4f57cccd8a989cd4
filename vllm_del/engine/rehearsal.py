"""The forward passes of a round over made-up rows, for the measurement of what they cost."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer, init_attn_backend

from vllm_del.draft.head import Head
from vllm_del.draft.loop import DraftRows, Drafts, Plan, draft, eager
from vllm_del.draft.network import EarlyExitNetwork, Layers
from vllm_del.kernels.advance_rows import PAD_SLOT

CONTEXT, LONG_CONTEXT = 256, 2048
"""The context lengths of made-up rows, where the model allows as much."""

STEPS = 3
"""Draft steps at once: what comes before each one in service comes before it here, so what the caches hold is alike."""


class Rehearsal:
    """Each call is complete when it returns. Made-up rows read and write any blocks: nothing is served yet."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        network: EarlyExitNetwork,
        segments: Sequence[Callable[..., Layers]],
        head: Head,
        draft_layers: set[str],
        kv_cache_config: KVCacheConfig,
        # of each KV cache group's block table: blocks in a row, and tokens in a block
        tables: Sequence[tuple[int, int]],
        device: torch.device,
    ) -> None:
        self._config = vllm_config
        self._network = network
        self._segments = segments
        self._head = head
        self._kv_cache_config = kv_cache_config
        self._widths, self._block_sizes = zip(*tables, strict=True)
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
        # Of a round of drafts that is timed.
        self.steps = min(STEPS, self.verify_each)
        self.context, self.long_context = min(CONTEXT, most), min(LONG_CONTEXT, most)

    def drafting(self, rows: int, segments: int, context: int) -> Callable[[], None]:
        """What runs `steps` draft steps through the first `segments` segments, from a context of so many tokens."""
        longest = context + self.steps
        zeros = torch.zeros(rows, dtype=torch.int64, device=self._device)
        made_up = DraftRows(
            input_ids=zeros.int(),
            positions=zeros.clone(),
            seq_lens=zeros.int(),
            live=zeros > 0,
            block_tables=[self._block_table(rows, width) for width in self._widths],
            block_sizes=self._block_sizes,
            slots=[zeros.clone() for _ in self._widths],
        )
        plan = Plan.uniform(rows, segments - 1, self.steps, self._device)
        drafts = Drafts(
            tokens=torch.empty(rows, self.steps, dtype=torch.int64, device=self._device),
            confidence=torch.zeros(rows, self.steps, device=self._device),
        )
        tokens, seq_lens, live = zeros.int(), (zeros + context).int(), zeros == 0

        def attention(_step: int, rows: DraftRows) -> AbstractContextManager[None]:
            starts = torch.arange(len(rows.live) + 1, dtype=torch.int32)
            slots = torch.stack(list(rows.slots))
            return self._context(self._draft_groups, starts, 1, rows.seq_lens, longest, rows.block_tables, slots)

        @torch.inference_mode()
        def run() -> None:
            made_up.begin(tokens, seq_lens, zeros, live)
            on_host = self._device.type == "cpu"
            draft(eager(self._segments, self._head, attention), made_up, plan, longest, drafts, compact=on_host)
            self._wait()

        return run

    @torch.inference_mode()
    def head(self, rows: int) -> None:
        """The head on so many rows."""
        hidden_size, dtype = self._config.model_config.get_hidden_size(), self._config.model_config.dtype
        self._head(torch.zeros(rows, hidden_size, dtype=dtype, device=self._device))
        self._wait()

    @torch.inference_mode()
    def verify(self, tokens: int, each: int, context: int) -> None:
        """A forward of the whole model with its logits and their argmax, over rows of `each` tokens."""

        each = min(tokens, each)
        rows = -(-tokens // each)
        starts = torch.arange(rows + 1, dtype=torch.int32).mul_(each).clamp_max_(tokens)
        seq_lens = torch.full((rows,), context + each, dtype=torch.int32, device=self._device)
        tables = [self._block_table(rows, width) for width in self._widths]
        nowhere = torch.full((len(self._widths), tokens), PAD_SLOT, device=self._device)
        with self._context(self._target_groups, starts, each, seq_lens, context + each, tables, nowhere):
            output = self._network.target(
                input_ids=torch.zeros(tokens, dtype=torch.int32, device=self._device),
                positions=torch.full((tokens,), context, device=self._device),
                intermediate_tensors=None,
                inputs_embeds=None,
            )
            hidden_states = output[0] if isinstance(output, tuple) else output
            self._network.target.compute_logits(hidden_states).argmax(-1)
        self._wait()

    def _context(
        self,
        groups: list,
        # [rows + 1] int32, on the host: where each row's query tokens begin
        starts: torch.Tensor,
        longest_query: int,
        # [rows] int32
        seq_lens: torch.Tensor,
        max_seq_len: int,
        # per KV cache group: [rows, max_blocks] int32, and [groups, tokens] int64
        block_tables: Sequence[torch.Tensor],
        slots: torch.Tensor,
    ) -> AbstractContextManager[None]:
        """vLLM's forward context for such rows."""
        metadata = build_attn_metadata(
            attn_groups=groups,
            num_reqs=len(starts) - 1,
            num_tokens=slots.shape[1],
            query_start_loc_gpu=starts.to(self._device),
            query_start_loc_cpu=starts,
            max_query_len=longest_query,
            seq_lens=seq_lens,
            max_seq_len=max_seq_len,
            block_tables=block_tables,
            slot_mappings=slots,
            kv_cache_config=self._kv_cache_config,
            seq_lens_cpu_upper_bound=torch.full((len(starts) - 1,), max_seq_len, dtype=torch.int32),
        )
        mapping = build_slot_mappings_by_layer(slots, self._kv_cache_config)
        return set_forward_context(metadata, self._config, num_tokens=slots.shape[1], slot_mapping=mapping)

    def _block_table(self, rows: int, width: int) -> torch.Tensor:
        """Blocks that differ as far as there are as many: reading one over and over would be too fast."""
        blocks = torch.arange(rows * width, dtype=torch.int32, device=self._device)
        return (blocks % self._kv_cache_config.num_blocks).view(rows, width)

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
