"""DelSpeculator: `del` on vLLM's Model Runner V2, the default wherever Triton works.

It differs from vLLM's own draft-model speculator in what it has not: no weights of its own, no KV cache of its
own, and no prefill, because the target has computed the early layers' KV of every accepted token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.dp_utils import DPSyncState
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.states import RequestState

from vllm_del.config import DelConfig
from vllm_del.draft.clock import Late
from vllm_del.draft.decide import DynamicPolicy, FixedPolicy, Verified
from vllm_del.draft.loop import DraftRows, Drafts, Plan, draft
from vllm_del.draft.network import EarlyExitNetwork
from vllm_del.draft.shadow import PROMPT_POSITIONS
from vllm_del.draft.upload import upload
from vllm_del.engine.compiled import compiled_segments
from vllm_del.engine.head import make_head
from vllm_del.engine.layers import early_attention_layers, log_plan
from vllm_del.engine.messages import Allowance, Report
from vllm_del.engine.setup import make_policy
from vllm_del.engine.slots import Slots


class DelSpeculator(DraftModelSpeculator):
    """Drafts for the V2 runner. Everything that varies from step to step lives on the device."""

    req_states: RequestState
    """The runner's, set where it makes its speculator."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.live = torch.zeros(self.max_num_reqs, dtype=torch.bool, device=device)
        # These buffers are the drafter's own, and a draft step has one query token a row: set once.
        torch.arange(self.max_num_reqs + 1, dtype=torch.int32, out=self.input_buffers.query_start_loc)
        # Room for preempted requests beside those of the batch.
        self.slots_of = Slots(4 * self.max_num_reqs, device)
        self.allowance = Allowance()
        self.report: Report | None = None
        # By request, how long a draft the policy wants, as far as the host knows.
        self.wanted: dict[str, int] = {}
        self._late_lengths = Late(first=())

    def load_model(self, target_model: nn.Module) -> None:
        """Take the target's early layers as the draft network. Loads nothing, and marks no layer as a draft's.

        Raises `ValueError` if the target's forward is not of the form the network runs.
        """
        config = self.speculative_config
        assert isinstance(config, DelConfig)
        self.model = self.load_draft_model(target_model, set())
        self.segments = compiled_segments(self.vllm_config, self.model, config.exits)
        self.head = make_head(target_model)
        # Until costs are measured: vLLM warms up with requests that it makes up.
        self.policy: FixedPolicy | DynamicPolicy = FixedPolicy(self.num_speculative_steps)
        self.draft_attn_layer_names = early_attention_layers(self.model, config.exits[-1])
        log_plan(self.vllm_config, self.model, self.head, "V2")

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> EarlyExitNetwork:
        return EarlyExitNetwork.from_target(target_model)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Draft steps are not captured: there is no graph to manage yet."""

    def capture(self) -> None:
        """Draft steps are not captured: there is no graph to capture yet."""

    def prepare_to_serve(self) -> None:
        """Called when all else is ready: measures what the policy goes by."""
        widths = [table.shape[1] for table in self.block_tables.input_block_tables]
        self.policy = make_policy(self, list(zip(widths, self.block_tables.block_sizes, strict=True)))

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        # [num_tokens, hidden_size]
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        # [num_reqs]
        num_sampled: torch.Tensor,
        # [num_reqs]
        num_rejected: torch.Tensor,
        # [max_num_reqs, 1]
        last_sampled: torch.Tensor,
        *_: Any,
        num_speculative_tokens: int | None = None,
        dp_sync_state: DPSyncState | None = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        **__: Any,
    ) -> torch.Tensor:
        """Draft tokens [num_reqs, num_speculative_steps] int64; the first `num_speculative_tokens` count."""
        num_rows = input_batch.num_reqs
        num_steps = self.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens
        if dp_sync_state is None and not dummy_run and not _any_row_samples(input_batch):
            return self.draft_tokens[:num_rows].zero_()
        num_padded, num_tokens_across_dp = num_rows, None
        if dp_sync_state is not None:
            sync, num_padded = self._build_uniform_batch_dp_sync(dp_sync_state, num_rows)
            num_tokens_across_dp = sync.num_tokens_across_dp

        rows = self._rows(num_padded)
        # A row whose prompt is unfinished has sampled nothing; a dummy batch owns no blocks.
        sampled = torch.zeros_like(num_sampled, dtype=torch.bool) if dummy_run else num_sampled > 0
        next_tokens = last_sampled[input_batch.idx_mapping].view(-1)
        rows.begin(next_tokens, input_batch.seq_lens[:num_rows], num_rejected, sampled)
        deepest = len(self.segments) - 1
        if dummy_run:
            # As much as any round may run: memory is profiled and code compiled with it.
            plan = Plan.uniform(num_padded, deepest, num_steps, self.device)
        else:
            slots = self.slots_of.of(input_batch.req_ids)
            if isinstance(self.policy, DynamicPolicy):
                verified = self._verified(input_batch, aux_hidden_states, num_sampled, num_rejected, rows, sampled)
                self.policy.observe(slots, verified)
            plan = self._plan(input_batch, slots, num_steps, sampled)
            if dp_sync_state is not None:
                plan = plan.padded(num_padded, deepest, num_steps)

        batch_desc = BatchExecutionDescriptor(cg_mode=CUDAGraphMode.NONE, num_tokens=num_padded, num_reqs=num_rows)
        seq_lens_bound = input_batch.seq_lens_cpu_upper_bound
        # Not our own copy: vLLM may have fitted the length to the memory since (--max-model-len auto).
        max_model_len = self.vllm_config.model_config.max_model_len
        self.draft_max_seq_len = min(int(seq_lens_bound[:num_rows].max()) + num_steps, max_model_len)
        skip_attention = dummy_run and skip_attn_for_dummy_run
        slot_mapping = None
        if not skip_attention:
            slot_mapping = build_slot_mappings_by_layer(
                self.block_tables.slot_mappings[:, :num_padded], self.kv_cache_config
            )

        @contextmanager
        def attention(step: int, _rows: DraftRows) -> Iterator[None]:
            metadata = None
            if not skip_attention:
                # vLLM counts the tokens that a draft has beyond the verified ones; our first step has one.
                metadata = self._build_uniform_attn_metadata(batch_desc, num_rows, 1, seq_lens_bound, step=step + 1)
            with set_forward_context(
                metadata,
                self.vllm_config,
                num_tokens=num_padded,
                num_tokens_across_dp=num_tokens_across_dp,
                slot_mapping=slot_mapping,
                batch_descriptor=BatchDescriptor(num_tokens=num_padded),
            ):
                yield

        drafts = Drafts(self.draft_tokens[:num_padded], self.draft_token_confidence_probs[:num_padded])
        launched = draft(self.segments, self.head, rows, plan, attention, max_model_len, drafts, compact=False)
        if not dummy_run and isinstance(self.policy, DynamicPolicy):
            self.policy.record(slots, plan, drafts, launched)
            self.report = Report(self.wanted, self.policy.counts())
        # vLLM verifies as many tokens of every row: where nothing was drafted, one that any vocabulary has.
        return self.draft_tokens[:num_rows].clamp_min_(0)

    def _plan(
        self,
        batch: InputBatch,
        # [num_reqs] int64
        slots: torch.Tensor,
        num_steps: int,
        # [num_reqs] bool
        sampled: torch.Tensor,
    ) -> Plan:
        """What the policy wants to draft, of that as much as there is room for and the next step will verify."""
        longest, verified, request_ids = self.allowance.longest, self.allowance.verified, batch.req_ids
        limit = num_steps * sampled
        if longest:
            limit = torch.minimum(limit, upload([longest.get(r, num_steps) for r in request_ids], self.device))
        plan = self.policy.plan(slots, limit, batch.seq_lens[: batch.num_reqs])
        if isinstance(self.policy, DynamicPolicy):
            lengths, requests = self._late_lengths.exchange(plan.length, request_ids)
            self.wanted = dict(zip(requests or (), lengths, strict=True))
        if verified:
            lengths = [verified.get(request, num_steps) for request in request_ids]
            length = torch.minimum(plan.length, upload(lengths, self.device))
            plan = replace(plan, length=length, longest=min(plan.longest, max(lengths)))
        return plan

    def _verified(
        self,
        batch: InputBatch,
        states: list[torch.Tensor] | None,
        # [num_reqs], [num_reqs]
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        rows: DraftRows,
        # [num_reqs] bool
        sampled: torch.Tensor,
    ) -> Verified:
        num_rows = batch.num_reqs
        # num_rejected counts a row's drafts that were not kept, and num_sampled those that were and one more.
        accepted = (num_sampled - 1).clamp_min(0)
        drafted = torch.where(sampled, accepted + num_rejected, 0)
        ended = (batch.num_computed_prefill_tokens_np < batch.prefill_len_np) & (
            batch.num_computed_prefill_tokens_np + batch.num_scheduled_tokens >= batch.prefill_len_np
        )
        # Longer than its prompt is what a preempted request begins again with, and it keeps what was learnt of it.
        whole_prompt = self.req_states.prompt_len.np[batch.idx_mapping_np[:num_rows]] == batch.prefill_len_np
        fresh = {*(ended & whole_prompt).nonzero()[0].tolist(), *self.slots_of.new_rows}
        return Verified(
            states=states or [],
            input_ids=batch.input_ids,
            start=batch.query_start_loc[1 : num_rows + 1].long() - 1 - drafted,
            drafted=drafted,
            accepted=accepted,
            next_token=rows.input_ids[:num_rows],
            sampled=sampled,
            longest=self.num_speculative_steps if batch.num_draft_tokens else 0,
            num_tokens=batch.num_tokens,
            contexts=int(batch.seq_lens_cpu_upper_bound[:num_rows].sum()),
            only_decodes=bool((batch.num_computed_prefill_tokens_np >= batch.prefill_len_np).all()),
            ended=[
                (row, min(PROMPT_POSITIONS, int(batch.num_scheduled_tokens[row]) - 1))
                for row in sorted(fresh)
                if ended[row]
            ],
            fresh=sorted(fresh),
        )

    def _rows(self, num_rows: int) -> DraftRows:
        # Memory profiling drafts before there is a KV cache.
        tables = getattr(self, "block_tables", None)
        return DraftRows(
            input_ids=self.input_buffers.input_ids[:num_rows],
            positions=self.input_buffers.positions[:num_rows],
            seq_lens=self.input_buffers.seq_lens[:num_rows],
            live=self.live[:num_rows],
            block_tables=[table[:num_rows] for table in tables.input_block_tables] if tables else [],
            block_sizes=tables.block_sizes if tables else [],
            slots=list(tables.slot_mappings[:, :num_rows]) if tables else [],
        )


def _any_row_samples(input_batch: InputBatch) -> bool:
    """Whether a row of the batch gets to the end of its prompt in this step, or is past it; host data only."""
    computed = input_batch.num_computed_prefill_tokens_np + input_batch.num_scheduled_tokens
    return bool((computed >= input_batch.prefill_len_np).any())
