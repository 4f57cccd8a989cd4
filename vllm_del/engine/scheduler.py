"""vLLM's two schedulers, with drafts sized by what the paged KV cache leaves for them.

A scheduler sees what no worker does: the free blocks, who waits, how much a request still wants. Each step it says how
long a draft each request may make (`Allowance`), reserves no more look-ahead than that, and takes placeholders for as
many drafts as the worker is going to make, which the worker reports back.
"""

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus

from vllm_del.engine.messages import STATISTICS_KEY, Allowance, Report
from vllm_del.policy.envelope import (
    Reserve,
    longest_draft,
    longest_in_room,
    room_in_blocks,
    slots_for,
    steps_to_fill,
)
from vllm_del.wishes import longest_wished

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

logger = init_logger(f"vllm.{__name__}")


class _SizesDrafts(Scheduler):
    """What both have in common."""

    # Steps that are scheduled before the outcome of one is known.
    _ahead: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # [registry] Constant, but not `None`, for which vLLM fills a new request's first step up with drafts nobody
        # made. Goes when vLLM asks its drafter how many there are.
        self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)
        self._most: int = self.num_spec_tokens
        self._is_dynamic: bool = self.vllm_config.speculative_config.is_dynamic
        self._groups = self.kv_cache_manager.coordinator.single_type_managers
        slots = slots_for(self._most, self._ahead)
        blocks = sum(-(-slots // group.block_size) for group in self._groups)
        self._reserve = Reserve(blocks, steps_to_fill(self._most, self._ahead))
        self._allowance = Allowance()
        # Since the last statistics: what workers counted, and rounds without a draft by reason
        self._counts: list[dict[str, Any]] = []
        self._undrafted: Counter[str] = Counter()
        # What the worker last reported; before that, and for a request that is new to it, the largest that any wants.
        self._wanted: dict[str, int] = {}
        self._usual: int = self._most
        # [registry] The look-ahead is the scheduler's own constant, handed on from within `schedule`.
        # Goes when vLLM asks for it by request.
        self._allocate = self.kv_cache_manager.allocate_slots
        self.kv_cache_manager.allocate_slots = self._allocate_with_room_for_drafts

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self._allowance = Allowance()
        self._reserve.begin_step()
        return super().schedule(*args, **kwargs)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        scheduler_output.del_allowance = self._allowance

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: "ModelRunnerOutput"
    ) -> "dict[int, EngineCoreOutputs]":
        report = getattr(model_runner_output, "del_report", None)
        if report is not None:
            self._take(report)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _wanted_length(self, request_id: str) -> int:
        """How long a draft the worker wants to make, as far as it is known here."""
        return self._wanted.get(request_id, self._usual)

    def _take(self, report: Report) -> None:
        if report.wanted:
            self._wanted, self._usual = report.wanted, max(report.wanted.values())
        if report.counts is not None and self.log_stats:
            self._counts.append(asdict(report.counts))

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """With what was counted."""
        stats = super().make_stats(*args, **kwargs)
        # Rounds of a fixed policy are counted by no one, and reasons alone would say that none drafts.
        if stats is not None and self._is_dynamic and (self._counts or self._undrafted):
            stats.kv_connector_stats = {STATISTICS_KEY: {"counts": self._counts, **self._undrafted}}
            self._counts, self._undrafted = [], Counter()
        return stats

    def update_draft_token_ids(self, draft_token_ids: "DraftTokenIds") -> None:
        """Of a synchronous step: the drafts that the next one verifies, and how many a request wants is known."""
        for request_id, drafts in zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True):
            if (request := self.requests.get(request_id)) is not None:
                room = self._allowance.longest.get(request_id, self._most)
                # V2 does not say what it drafted, only how many there may be.
                room = min(room, self._wanted_length(request_id))
                del drafts[longest_draft(room, request.max_tokens - request.num_output_tokens) :]
        super().update_draft_token_ids(draft_token_ids)

    def _allocate_with_room_for_drafts(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        *args: Any,
        num_lookahead_tokens: int = 0,
        num_external_computed_tokens: int = 0,
        reserved_blocks: int = 0,
        **kwargs: Any,
    ) -> "KVCacheBlocks | None":
        """In place of the manager's `allocate_slots`: the look-ahead is each request's own, and what it may take too.

        `None`, as there, if there are not enough blocks; never for want of look-ahead alone.
        """

        def allocate(length: int, leave: int) -> "KVCacheBlocks | None":
            blocks = self._allocate(
                request,
                num_new_tokens,
                num_new_computed_tokens,
                *args,
                num_lookahead_tokens=slots_for(length, self._ahead),
                num_external_computed_tokens=num_external_computed_tokens,
                reserved_blocks=reserved_blocks + leave,
                **kwargs,
            )
            if blocks is not None:
                self._allow(request, length, wish, end)
            return blocks

        end = request.num_computed_tokens + num_new_computed_tokens + num_external_computed_tokens + num_new_tokens
        wish = self._wish(request, end)
        held = [(len(group.req_to_blocks.get(request.request_id, ())), group.block_size) for group in self._groups]
        room = longest_in_room(wish, room_in_blocks(end, held), self._ahead)
        running = len(self.running)
        # A block more only for who is going to use it.
        if room < wish and self._wanted_length(request.request_id):
            leave = self._reserve.for_drafts(running)
            if leave is not None:
                leave += self._for_prompts_under_way(request)
                if (blocks := allocate(wish, leave)) is not None:
                    self._reserve.taken()
                    return blocks
        if request.status == RequestStatus.RUNNING:
            return allocate(room, 0)
        leave = self._reserve.for_newcomer(running)
        if leave:
            # What comes of its prompt after this step must not take them either.
            rest = max(0, request.num_tokens - end)
            leave += self._for_prompts_under_way(request) + sum(-(-rest // group.block_size) for group in self._groups)
        blocks = allocate(room, leave)
        if blocks is None and leave:
            self._reserve.newcomer_waits()
        return blocks

    def _for_prompts_under_way(self, request: Request) -> int:
        """Blocks that prompts have still to get, but for that of `request`, as vLLM itself counts them."""
        return sum(self._request_remaining_blocks(other) for other in self._inflight_prefills if other is not request)

    def _allow(self, request: Request, length: int, wish: int, end: int) -> None:
        """The request may draft so many tokens after those up to `end`, of as many as it can use."""
        request_id, wished = request.request_id, self._wished(request)
        if wished < self._most:
            self._allowance.wished[request_id] = wished
        if length < self._most:
            self._allowance.longest[request_id] = length
        if length or end < request.num_tokens:
            return
        if not wish:
            self._undrafted["ends" if wished else "not_wanted"] += 1
        else:
            self._undrafted["no_room" if self._wanted_length(request_id) else "does_not_pay"] += 1

    def _wish(self, request: Request, end: int) -> int:
        """The longest draft that the request wants and can use after its tokens up to `end`."""
        if end < request.num_tokens:
            return 0  # the prompt goes on
        # One token comes from this step, and one at least from the step before if that is still on its way.
        coming = 1 + (request.num_output_placeholders > 0)
        return longest_draft(self._wished(request), request.max_tokens - request.num_output_tokens - coming)

    def _wished(self, request: Request) -> int:
        """The longest draft that the request allows, read once."""
        if not hasattr(request, "del_longest_wished"):
            assert request.sampling_params is not None
            try:
                request.del_longest_wished = longest_wished(request.sampling_params.extra_args, self._most)
            except ValueError as error:
                # It was refused where requests come in, unless it came another way; here it would end all others too.
                logger.warning("del: request %s drafts as any other: %s", request.request_id, error)
                request.del_longest_wished = self._most
        return request.del_longest_wished


class DelScheduler(_SizesDrafts):
    """For synchronous scheduling: the drafts are known when the next step is scheduled."""

    _ahead = 0


class DelAsyncScheduler(_SizesDrafts, AsyncScheduler):
    """For asynchronous scheduling: a step is scheduled before the drafts it verifies are made."""

    _ahead = 1

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        verified: dict[str, int] = {}
        self._allowance.verified = verified
        for request_id in scheduler_output.num_scheduled_tokens:
            request = self.requests[request_id]
            if not request.is_prefill_chunk:
                wanted = self._wanted_length(request_id)
                number = min(wanted, self._allowance.longest.get(request_id, self._most))
                request.spec_token_ids = [-1] * number
                if number < self._most:
                    verified[request_id] = number
