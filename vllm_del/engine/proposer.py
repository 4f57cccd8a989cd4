"""DelProposer: `del` on vLLM's V1 model runner, the one that the CPU build of vLLM uses.

It is a `DraftModelProposer` to vLLM, so the runner prepares next tokens and rejected counts for it; it drafts
with the target's own early layers instead of loading a model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer, init_attn_backend

from vllm_del.config import DelConfig
from vllm_del.draft.head import ExitHead
from vllm_del.draft.loop import DraftRows, draft
from vllm_del.draft.network import EarlyExitNetwork
from vllm_del.engine.compiled import compiled_exit
from vllm_del.engine.layers import early_attention_layers, log_plan


class DelProposer(DraftModelProposer):
    """Drafts for the V1 runner. On a CPU all of it is immediate: the device is the host."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        super().__init__(vllm_config, device, runner)
        self.runner = runner

    def load_model(self, target_model: nn.Module) -> None:
        """Take the target's early layers as the draft network. Loads nothing.

        Raises `ValueError` if the target's forward is not of the form the network runs.
        """
        config = self.speculative_config
        assert isinstance(config, DelConfig)
        self.model = EarlyExitNetwork.from_target(target_model)
        self.depth = config.exit_layer
        self.exit = compiled_exit(self.vllm_config, self.model, self.depth)
        self.head = ExitHead(target_model)
        self._draft_attn_layer_names = early_attention_layers(self.model, self.depth)
        # The runner stops drafting for the whole batch when one sequence nears the drafter's longest length.
        # Our rows stop one by one (advance_rows), so this bound must not bite.
        self.runner.effective_drafter_max_model_len = self.max_model_len + self.num_speculative_tokens
        log_plan(self.vllm_config, self.model, "V1")

    def initialize_attn_backend(
        self, kv_cache_config: KVCacheConfig, kernel_block_sizes: list[int] | None = None
    ) -> None:
        """Attention groups over the early layers, in every KV cache group that holds one of them."""
        self.kv_cache_config = kv_cache_config
        self.attn_groups, _, _ = init_attn_backend(
            kv_cache_config, self.vllm_config, self.device, active_layer_names=self._draft_attn_layer_names
        )
        self.draft_attn_groups = [group for groups in self.attn_groups for group in groups]
        num_groups, num_rows = len(kv_cache_config.kv_cache_groups), self.max_batch_size
        self.slots = torch.zeros(num_groups, num_rows, dtype=torch.int64, device=self.device)
        self.seq_lens = torch.zeros(num_rows, dtype=torch.int32, device=self.device)
        self.live = torch.zeros(num_rows, dtype=torch.bool, device=self.device)
        self.query_start_loc_cpu = torch.arange(num_rows + 1, dtype=torch.int32)

    def propose(
        self,
        num_speculative_tokens: int,
        # [num_tokens]
        target_token_ids: torch.Tensor,
        # [num_tokens]
        target_positions: torch.Tensor,
        # [num_tokens, hidden_size]
        target_hidden_states: torch.Tensor,
        # [batch_size] int32
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        *_: Any,
        # [batch_size] int32
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        **__: Any,
    ) -> torch.Tensor:
        """Draft tokens [batch_size, num_speculative_tokens] int64."""
        num_rows = next_token_ids.shape[0]
        unfinished = self.runner.discard_request_mask.gpu[:num_rows]
        if self.vllm_config.parallel_config.data_parallel_size == 1 and unfinished.all():
            return next_token_ids.new_zeros(num_rows, num_speculative_tokens, dtype=torch.int64)
        _, num_padded, num_tokens_across_dp = self._determine_batch_execution_and_padding(num_rows)
        rows = self._rows(num_padded)
        rows.input_ids[:num_rows].copy_(next_token_ids)
        # seq_lens counts what the verification computed; the next token goes to the position after what it kept.
        rows.positions.fill_(-1)
        rows.positions[:num_rows].add_(common_attn_metadata.seq_lens[:num_rows])
        if num_rejected_tokens_gpu is not None:
            rows.positions[:num_rows].sub_(num_rejected_tokens_gpu)
        # A row whose prompt is unfinished has sampled nothing that counts.
        rows.live.zero_()
        torch.logical_not(unfinished, out=rows.live[:num_rows])
        draft_tokens = torch.empty(num_padded, num_speculative_tokens, dtype=torch.int64, device=self.device)
        # Not our own copy: vLLM may have fitted the length to the memory since (--max-model-len auto).
        max_model_len = self.vllm_config.model_config.max_model_len
        max_seq_len = min(common_attn_metadata.max_seq_len + num_speculative_tokens, max_model_len)

        slot_mapping = build_slot_mappings_by_layer(self.slots[:, :num_padded], self.kv_cache_config)

        @contextmanager
        def attention(step: int) -> Iterator[None]:
            metadata = build_attn_metadata(
                attn_groups=self.attn_groups,
                num_reqs=num_rows,
                num_tokens=num_rows,
                query_start_loc_gpu=self.arange[: num_rows + 1],
                query_start_loc_cpu=self.query_start_loc_cpu[: num_rows + 1],
                max_query_len=1,
                seq_lens=rows.seq_lens,
                max_seq_len=max_seq_len,
                block_tables=[table[:num_rows] for table in rows.block_tables],
                slot_mappings=self.slots[:, :num_rows],
                kv_cache_config=self.kv_cache_config,
                seq_lens_cpu_upper_bound=rows.seq_lens,
            )
            with set_forward_context(
                metadata,
                self.vllm_config,
                num_tokens=num_padded,
                num_tokens_across_dp=num_tokens_across_dp,
                slot_mapping=slot_mapping,
            ):
                yield

        draft(self.exit, self.head, rows, attention, max_model_len, draft_tokens)
        return draft_tokens[:num_rows]

    def _rows(self, num_rows: int) -> DraftRows:
        tables = self.runner.input_batch.block_table.block_tables
        return DraftRows(
            input_ids=self.input_ids[:num_rows],
            positions=self.positions[:num_rows],
            seq_lens=self.seq_lens[:num_rows],
            live=self.live[:num_rows],
            block_tables=[table.get_device_tensor(num_rows) for table in tables],
            block_sizes=[table.block_size for table in tables],
            slots=list(self.slots[:, :num_rows]),
        )

    def dummy_run(self, num_tokens: int, *_: Any, **__: Any) -> None:
        """Keep step with data-parallel ranks that draft for real; alone, one step compiles and warms up."""
        alone = self.vllm_config.parallel_config.data_parallel_size == 1
        _, num_padded, num_tokens_across_dp = self._determine_batch_execution_and_padding(num_tokens)
        for _step in range(1 if alone else self.num_speculative_tokens):
            with set_forward_context(
                None, self.vllm_config, num_tokens=num_padded, num_tokens_across_dp=num_tokens_across_dp
            ):
                self.exit(self.input_ids[:num_padded], self.positions[:num_padded])
