"""DelSpeculator: `del` on vLLM's Model Runner V2, the default wherever Triton works.

It differs from vLLM's own draft-model speculator in what it has not: no weights of its own, no KV cache of its
own, and no prefill, because the target has computed the early layers' KV of every accepted token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.dp_utils import DPSyncState, dispatch_cg_and_sync_dp
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from vllm_del.config import DelConfig
from vllm_del.draft.clock import Late
from vllm_del.draft.decide import DynamicPolicy, FixedPolicy
from vllm_del.draft.loop import DraftRows, Drafts, Forward, Plan, draft, eager
from vllm_del.draft.network import EarlyExitNetwork
from vllm_del.draft.upload import upload
from vllm_del.engine.compiled import compiled_segments
from vllm_del.engine.draft_head import make_heads
from vllm_del.engine.graphs import DraftGraphs
from vllm_del.engine.layers import early_attention_layers, log_plan
from vllm_del.engine.messages import Allowance, Report
from vllm_del.engine.setup import make_policy
from vllm_del.engine.slots import Slots
from vllm_del.engine.steps import on_v2
from vllm_del.engine.verification import EvenGraphs, record_decodes, run_made_up

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner


class DelSpeculator(DraftModelSpeculator):
    """Drafts for the V2 runner. Everything that varies from step to step lives on the device."""

    compact: bool = False

    runner: "GPUModelRunner"
    """Set when it is complete, with its speculator in it."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.live = torch.zeros(self.max_num_reqs, dtype=torch.bool, device=device)
        # Where graphs find the segment after which each row leaves.
        self.exit = torch.zeros(self.max_num_reqs, dtype=torch.int64, device=device)
        self.graphs: DraftGraphs | None = None
        self._one_token_a_row()
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
        self.whole_head, self.head, self.counted = make_heads(self.vllm_config, target_model, self.device)
        # Until costs are measured: vLLM warms up with requests that it makes up.
        self.policy: FixedPolicy | DynamicPolicy = FixedPolicy(self.num_speculative_steps)
        self.draft_attn_layer_names = early_attention_layers(self.model, config.exits[-1])
        log_plan(self.vllm_config, self.model, self.head, "V2")

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> EarlyExitNetwork:
        return EarlyExitNetwork.from_target(target_model)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Called when the KV cache is there, once before for a trial of how much memory graphs take."""
        record_decodes(self.runner, cudagraph_mode)
        self.graphs = DraftGraphs(
            self.vllm_config, self.device, cudagraph_mode, self.segments, self.head, self.input_buffers, self.exit
        )

    def capture(self) -> None:
        """Called after the target's graphs are captured, and where there are any."""
        if self.graphs is not None and self.graphs.needs_capture():
            self.graphs.capture_stages(self.model_state, self.block_tables, self.attn_groups, self.kv_cache_config)
            self._one_token_a_row()

    def prepare_to_serve(self) -> None:
        """Called when all else is ready: measures what the policy goes by."""
        if self.graphs is not None:
            self.graphs.log()
        self.policy = make_policy(self)

    @property
    def even(self) -> bool:
        return isinstance(self.runner.cudagraph_manager, EvenGraphs)

    def made_up_round(self, rows: int, longest: int) -> tuple[DraftRows, Forward]:
        assert self.graphs is not None
        batch = self.graphs.dispatch(rows, rows, uniform_token_count=1, num_active_loras=0)
        bounds = torch.full((rows,), longest, dtype=torch.int32)
        return self._rows(batch.num_tokens), self._forward(batch, bounds, 0, longest, None)

    def made_up_verification(self, lengths: list[int], context: int) -> float | None:
        return run_made_up(self.runner, self.model.target.compute_logits, lengths, context)

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
        is_profile: bool = False,
        **__: Any,
    ) -> torch.Tensor:
        """Draft tokens [num_reqs, num_speculative_steps] int64; the first `num_speculative_tokens` count."""
        num_rows = input_batch.num_reqs
        num_steps = self.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens
        # Ranks of data parallelism have to go in step.
        alone = dp_sync_state is None
        if alone and not dummy_run and not _any_row_samples(input_batch):
            return self.draft_tokens[:num_rows].zero_()
        if not dummy_run:
            slots = self.slots_of.of(input_batch.req_ids)
            if alone and self._rest(slots, input_batch):
                return self.draft_tokens[:num_rows].zero_()
        sync, num_tokens = None, num_rows
        if dp_sync_state is not None:
            sync, num_tokens = self._build_uniform_batch_dp_sync(dp_sync_state, num_rows)
        batch, sync = dispatch_cg_and_sync_dp(
            self.graphs,
            num_rows,
            num_tokens,
            uniform_token_count=1,
            dp_size=self.dp_size,
            dp_rank=self.dp_rank,
            need_eager=is_profile,
            dp_sync_state=sync,
        )
        num_padded = batch.num_tokens

        rows = self._rows(num_padded)
        # A row whose prompt is unfinished has sampled nothing; a dummy batch owns no blocks.
        sampled = torch.zeros_like(num_sampled, dtype=torch.bool) if dummy_run else num_sampled > 0
        next_tokens = last_sampled[input_batch.idx_mapping].view(-1)
        rows.begin(next_tokens, input_batch.seq_lens[:num_rows], num_rejected, sampled)
        if dummy_run:
            # As much as any round may run: memory is profiled and code compiled with it.
            plan = Plan.uniform(num_padded, len(self.segments) - 1, num_steps, self.device)
        else:
            if self.counted is not None or isinstance(self.policy, DynamicPolicy):
                verified = on_v2(
                    input_batch,
                    self.runner.req_states.prompt_len.np,
                    self.slots_of,
                    num_sampled,
                    num_rejected,
                    sampled,
                    aux_hidden_states or [],
                    rows.input_ids[:num_rows],
                )
                if self.counted is not None:
                    self.counted.observe(verified)
                if isinstance(self.policy, DynamicPolicy):
                    self.policy.observe(slots, verified)
            plan = self._plan(input_batch, slots, num_steps, sampled)
            if sync is not None:
                # Every rank runs as much as any of them may.
                plan = plan.padded(num_padded, len(self.segments) - 1, num_steps)
            elif num_padded > num_rows:
                plan = plan.padded(num_padded, plan.deepest, plan.longest)

        # Not our own copy: vLLM may have fitted the length to the memory since (--max-model-len auto).
        max_model_len = self.vllm_config.model_config.max_model_len
        has_attention = not (dummy_run and skip_attn_for_dummy_run)
        lengths = input_batch.seq_lens_cpu_upper_bound[:num_rows] if has_attention else None
        forward = self._forward(batch, lengths, num_steps, max_model_len, sync)
        drafts = Drafts(self.draft_tokens[:num_padded], self.draft_token_confidence_probs[:num_padded])
        launched = draft(forward, rows, plan, max_model_len, drafts, self.compact)
        if not dummy_run and isinstance(self.policy, DynamicPolicy):
            self.policy.record(slots, plan, drafts, launched)
            self.report = Report(self.wanted, self.policy.counts())
        # vLLM verifies as many tokens of every row: where nothing was drafted, one that any vocabulary has.
        return self.draft_tokens[:num_rows].clamp_min_(0)

    def _rest(self, slots: torch.Tensor, batch: InputBatch) -> bool:
        """Pass over a round in which nothing was drafted, every row has sampled a token, and nothing is to be drafted,
        and say whether it is such a one: some fifty small kernels less. Where tokens are counted no round is."""
        policy = self.policy
        if not isinstance(policy, DynamicPolicy) or self.counted is not None:
            return False
        if batch.num_draft_tokens or batch.has_prefill:
            return False
        contexts = int(batch.seq_lens_cpu_upper_bound[: len(slots)].sum())
        if not policy.rest(slots, contexts, self.allowance.may_draft(len(slots))):
            return False
        self.report = Report(counts=policy.counts())
        return True

    def _forward(
        self,
        batch: BatchExecutionDescriptor,
        # [rows] int32, on the host: bounds on the contexts that the verification left; None: without attention
        lengths: torch.Tensor | None,
        num_steps: int,
        max_model_len: int,
        sync: DPSyncState | None,
    ) -> Forward:
        """The draft steps of a round of at most `num_steps`, by graph where one is recorded for such a batch."""
        num_padded, metadata, slot_mapping = batch.num_tokens, None, None
        if lengths is not None:
            self.draft_max_seq_len = min(int(lengths.max()) + num_steps, max_model_len)
            slots = self.block_tables.slot_mappings[:, :num_padded]
            slot_mapping = build_slot_mappings_by_layer(slots, self.kv_cache_config)

        def renew_metadata(step: int) -> None:
            nonlocal metadata
            if lengths is None:
                return
            if metadata is not None and self.supports_decode_metadata_update:
                self._update_draft_decode_metadata(metadata, len(lengths))
                return
            # vLLM counts the tokens that a draft has beyond the verified ones; our first step has one.
            further = num_steps if self.supports_decode_metadata_update else step + 1
            metadata = self._build_uniform_attn_metadata(batch, len(lengths), 1, lengths, step=further)

        @contextmanager
        def attention(step: int, _rows: DraftRows) -> Iterator[None]:
            renew_metadata(step)
            with set_forward_context(
                metadata,
                self.vllm_config,
                num_tokens=num_padded,
                num_tokens_across_dp=None if sync is None else sync.num_tokens_across_dp,
                slot_mapping=slot_mapping,
                batch_descriptor=BatchDescriptor(num_tokens=num_padded),
            ):
                yield

        def replay(step: int, rows: DraftRows, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
            assert self.graphs is not None
            renew_metadata(step)
            if step == 0:
                self.exit[:num_padded].copy_(plan.exit)
            return self.graphs.replay(batch, plan.deepest)

        return replay if batch.cg_mode == CUDAGraphMode.FULL else eager(self.segments, self.head, attention)

    def _one_token_a_row(self) -> None:
        """The buffers are the drafter's own, and all its steps are alike: set once, and after vLLM's dummy batches."""
        torch.arange(self.max_num_reqs + 1, dtype=torch.int32, out=self.input_buffers.query_start_loc)

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

        def by_row(of: dict[str, int]) -> list[int]:
            return [of.get(request, num_steps) for request in batch.req_ids]

        allowance, room = self.allowance, num_steps
        wished = limit = torch.full_like(slots, num_steps)
        if allowance.wished:
            wished = upload(by_row(allowance.wished), self.device)
        if allowance.longest:
            lengths = by_row(allowance.longest)
            limit, room = upload(lengths, self.device), max(lengths)
        plan = self.policy.plan(slots, wished, limit * sampled, batch.seq_lens[: batch.num_reqs])
        length = plan.length
        if isinstance(self.policy, DynamicPolicy):
            lengths, requests = self._late_lengths.exchange(self.policy.wanted, batch.req_ids)
            self.wanted = dict(zip(requests or (), lengths, strict=True))
        if allowance.verified:
            lengths = by_row(allowance.verified)
            length, room = torch.minimum(length, upload(lengths, self.device)), min(room, max(lengths))
        return replace(plan, length=length, longest=min(plan.longest, room))

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
