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
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer, init_attn_backend

from vllm_del.config import DelConfig
from vllm_del.draft.decide import DynamicPolicy, FixedPolicy
from vllm_del.draft.loop import NO_TOKEN, AttentionContext, DraftRows, Drafts, Forward, draft, eager, run_segments
from vllm_del.draft.network import EarlyExitNetwork
from vllm_del.engine.compiled import compiled_segments
from vllm_del.engine.draft_head import make_heads
from vllm_del.engine.layers import early_attention_layers, log_plan
from vllm_del.engine.messages import Allowance, Report
from vllm_del.engine.setup import make_policy
from vllm_del.engine.slots import Slots
from vllm_del.engine.steps import on_v1
from vllm_del.kernels.advance_rows import PAD_SLOT


class DelProposer(DraftModelProposer):
    """Drafts for the V1 runner. On a CPU all of it is immediate: the device is the host."""

    even: bool = False

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        super().__init__(vllm_config, device, runner)
        self.runner = runner
        # Under data parallelism the ranks' forward passes go in step, so none may do fewer of them.
        self.alone = self.compact = vllm_config.parallel_config.data_parallel_size == 1
        # Room for preempted requests beside those of the batch.
        self.slots_of = Slots(4 * self.max_batch_size, device)
        self.num_drafts: list[int] | None = None
        self.allowance = Allowance()
        self.report: Report | None = None

    def load_model(self, target_model: nn.Module) -> None:
        """Take the target's early layers as the draft network. Loads nothing.

        Raises `ValueError` if the target's forward is not of the form the network runs.
        """
        config = self.speculative_config
        assert isinstance(config, DelConfig)
        self.model = EarlyExitNetwork.from_target(target_model)
        self.segments = compiled_segments(self.vllm_config, self.model, config.exits)
        self.whole_head, self.head, self.counted = make_heads(self.vllm_config, target_model, self.device)
        # Until costs are measured.
        self.policy: FixedPolicy | DynamicPolicy = FixedPolicy(self.num_speculative_tokens)
        self._draft_attn_layer_names = early_attention_layers(self.model, config.exits[-1])
        # The runner stops drafting for the whole batch when one sequence nears the drafter's longest length.
        # Our rows stop one by one (advance_rows), so this bound must not bite.
        self.runner.effective_drafter_max_model_len = self.max_model_len + self.num_speculative_tokens
        log_plan(self.vllm_config, self.model, self.head, "V1")

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

    def prepare_to_serve(self) -> None:
        """Called when all else is ready: measures what the policy goes by."""
        # Groups of its own: those in service keep state between steps.
        self._all_groups, _, _ = init_attn_backend(self.kv_cache_config, self.vllm_config, self.device)
        self.policy = make_policy(self)

    def made_up_round(self, rows: int, longest: int) -> tuple[DraftRows, Forward]:
        return self._rows(rows), eager(self.segments, self.head, self.attention(longest))

    def made_up_verification(self, lengths: list[int], context: int) -> None:
        rows, tokens = len(lengths), sum(lengths)
        slots = torch.full((len(self.slots), tokens), PAD_SLOT, device=self.device)
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        longest = context + max(lengths)
        metadata = build_attn_metadata(
            attn_groups=self._all_groups,
            num_reqs=rows,
            num_tokens=tokens,
            query_start_loc_gpu=starts.to(self.device),
            query_start_loc_cpu=starts,
            max_query_len=max(lengths),
            seq_lens=torch.full((rows,), longest, dtype=torch.int32, device=self.device),
            max_seq_len=longest,
            block_tables=self._rows(rows).block_tables,
            slot_mappings=slots,
            kv_cache_config=self.kv_cache_config,
            seq_lens_cpu_upper_bound=torch.full((rows,), longest, dtype=torch.int32),
        )
        mapping = build_slot_mappings_by_layer(slots, self.kv_cache_config)
        with set_forward_context(metadata, self.vllm_config, num_tokens=tokens, slot_mapping=mapping):
            output = self.model.target(
                input_ids=torch.zeros(tokens, dtype=torch.int32, device=self.device),
                positions=torch.full((tokens,), context, device=self.device),
                intermediate_tensors=None,
                inputs_embeds=None,
            )
            hidden_states = output[0] if isinstance(output, tuple) else output
            self.model.target.compute_logits(hidden_states).argmax(-1)

    def prepare_next_token_ids_padded(
        self,
        # [batch_size, 1 + longest draft]
        sampled_token_ids: torch.Tensor,
        requests: Any,
        gpu_input_batch: Any,
        # [rows] bool
        discard_request_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called before `propose`: the next token of each row, and how many it has sampled, [batch_size] int32 each.

        Where every row has sampled one there is nothing to look for, nor to replace by what the request had before.
        """
        num_rows, most = sampled_token_ids.shape
        if most == 1 and not discard_request_mask[:num_rows].any():
            next_token_ids = sampled_token_ids[:, 0].int()
            return next_token_ids, torch.ones_like(next_token_ids)
        return super().prepare_next_token_ids_padded(sampled_token_ids, requests, gpu_input_batch, discard_request_mask)

    def prepare_inputs_padded(
        self,
        common_attn_metadata: CommonAttentionMetadata,
        spec_decode_metadata: SpecDecodeMetadata,
        # [batch_size]
        valid_sampled_tokens_count: torch.Tensor,
    ) -> tuple[CommonAttentionMetadata, torch.Tensor, torch.Tensor]:
        """Called before `propose` in a step that verified drafts; keeps how many there were of each row."""
        self.num_drafts = spec_decode_metadata.num_draft_tokens
        return super().prepare_inputs_padded(common_attn_metadata, spec_decode_metadata, valid_sampled_tokens_count)

    def propose(
        self,
        num_speculative_tokens: int,
        # [num_tokens]
        target_token_ids: torch.Tensor,
        # [num_tokens]
        target_positions: torch.Tensor,
        # [num_tokens, hidden_size], or the auxiliary hidden states side by side
        target_hidden_states: torch.Tensor,
        # [batch_size] int32
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        *_: Any,
        # [batch_size] int32
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        **__: Any,
    ) -> list[list[int]]:
        """Draft tokens of each row, as many as it drafted."""
        num_rows = next_token_ids.shape[0]
        drafted, self.num_drafts = self.num_drafts, None
        unfinished = self.runner.discard_request_mask.gpu[:num_rows]
        if self.alone and unfinished.all():
            if isinstance(self.policy, DynamicPolicy) and self.policy.stopwatch:
                self.policy.stopwatch.pause()
            return [[] for _ in range(num_rows)]
        rejected = num_rejected_tokens_gpu
        if rejected is None:
            rejected = torch.zeros(num_rows, dtype=torch.int32, device=self.device)
        sampled = ~unfinished
        request_ids = self.runner.input_batch.req_ids
        slots = self.slots_of.of(request_ids)
        if drafted is None and sampled.all() and self._rest(slots, common_attn_metadata):
            return [[] for _ in range(num_rows)]
        if self.counted is not None or isinstance(self.policy, DynamicPolicy):
            verified = on_v1(
                self.runner.input_batch,
                drafted,
                common_attn_metadata,
                self.slots_of,
                rejected,
                sampled,
                target_token_ids,
                target_hidden_states.split(self.hidden_size, dim=-1),
                next_token_ids,
            )
            if self.counted is not None:
                self.counted.observe(verified)
            if isinstance(self.policy, DynamicPolicy):
                self.policy.observe(slots, verified)
        wished, longest = (
            torch.tensor([of.get(request, num_speculative_tokens) for request in request_ids])
            for of in (self.allowance.wished, self.allowance.longest)
        )
        plan = self.policy.plan(slots, wished, longest * sampled, common_attn_metadata.seq_lens[:num_rows])

        num_padded, across_dp = num_rows, None
        if not self.alone:
            _, num_padded, across_dp = self._determine_batch_execution_and_padding(num_rows)
            plan = plan.padded(num_padded, len(self.segments) - 1, num_speculative_tokens)
        rows = self._rows(num_padded)
        # A row whose prompt is unfinished has sampled nothing that counts.
        rows.begin(next_token_ids, common_attn_metadata.seq_lens[:num_rows], rejected, sampled)
        drafts = Drafts(
            tokens=torch.empty(num_padded, num_speculative_tokens, dtype=torch.int64, device=self.device),
            confidence=torch.zeros(num_padded, num_speculative_tokens, device=self.device),
        )
        # Not our own copy: vLLM may have fitted the length to the memory since (--max-model-len auto).
        max_model_len = self.vllm_config.model_config.max_model_len
        max_seq_len = min(common_attn_metadata.max_seq_len + num_speculative_tokens, max_model_len)
        forward = eager(self.segments, self.head, self.attention(max_seq_len, across_dp))
        launched = draft(forward, rows, plan, max_model_len, drafts, self.compact)
        if isinstance(self.policy, DynamicPolicy):
            self.policy.record(slots, plan, drafts, launched)
            wanted = dict(zip(request_ids, self.policy.wanted.tolist(), strict=True))
            self.report = Report(wanted, self.policy.counts())
        return [[token for token in row if token != NO_TOKEN] for row in drafts.tokens[:num_rows].tolist()]

    def _rest(self, slots: torch.Tensor, batch_metadata: CommonAttentionMetadata) -> bool:
        """Pass over a round in which nothing was drafted, every row has sampled a token, and nothing is to be drafted,
        and say whether it is such a one. Where tokens are counted, or ranks go in step, no round is."""
        policy, batch, num_rows = self.policy, self.runner.input_batch, len(slots)
        if not isinstance(policy, DynamicPolicy) or not self.alone or self.counted is not None:
            return False
        if batch_metadata.num_actual_tokens != num_rows:
            return False  # some of it is of a prompt, or of what a preempted sequence had generated
        if (batch.num_computed_tokens_cpu[:num_rows] < batch.num_prompt_tokens[:num_rows]).any():
            return False
        contexts = int(batch_metadata.seq_lens[:num_rows].sum())
        if not policy.rest(slots, contexts, self.allowance.may_draft(num_rows)):
            return False
        self.report = Report(counts=policy.counts())
        return True

    def attention(self, max_seq_len: int, num_tokens_across_dp: torch.Tensor | None = None) -> AttentionContext:
        """The forward context of draft steps, for contexts of up to `max_seq_len`."""

        @contextmanager
        def attention(_step: int, rows: DraftRows) -> Iterator[None]:
            num_rows = rows.live.shape[0]
            slots = torch.stack(list(rows.slots))
            metadata = build_attn_metadata(
                attn_groups=self.attn_groups,
                num_reqs=num_rows,
                num_tokens=num_rows,
                query_start_loc_gpu=self.arange[: num_rows + 1],
                query_start_loc_cpu=self.query_start_loc_cpu[: num_rows + 1],
                max_query_len=1,
                seq_lens=rows.seq_lens,
                max_seq_len=max_seq_len,
                block_tables=rows.block_tables,
                slot_mappings=slots,
                kv_cache_config=self.kv_cache_config,
                seq_lens_cpu_upper_bound=rows.seq_lens,
            )
            with set_forward_context(
                metadata,
                self.vllm_config,
                num_tokens=num_rows,
                num_tokens_across_dp=num_tokens_across_dp,
                slot_mapping=build_slot_mappings_by_layer(slots, self.kv_cache_config),
            ):
                yield

        return attention

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
        _, num_padded, num_tokens_across_dp = self._determine_batch_execution_and_padding(num_tokens)
        for _step in range(1 if self.alone else self.num_speculative_tokens):
            with set_forward_context(
                None, self.vllm_config, num_tokens=num_padded, num_tokens_across_dp=num_tokens_across_dp
            ):
                run_segments(self.segments, self.input_ids[:num_padded], self.positions[:num_padded])
