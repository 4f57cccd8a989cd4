"""The scheduler hook, on vLLM's real schedulers and KV cache manager; a stand-in for the worker drafts and verifies."""

import random
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from tests.engine.host import async_scheduling
from vllm_del.engine.messages import Allowance, Report
from vllm_del.policy.envelope import slots_for, steps_to_fill

BLOCK = 16
LONGEST = 6
SPEC = {"method": "del", "num_speculative_tokens": LONGEST}


@dataclass
class Sequence:
    """A request, and how often the stand-in's drafts for it are accepted."""

    prompt: int
    output: int
    acceptance: float = 0.8
    arrival: int = 0
    extra_args: dict[str, Any] | None = None


@dataclass
class Seen:
    """What a run came to."""

    steps: int = 0
    preemptions: int = 0
    # blocks that were held for drafts alone when a request was preempted
    in_the_way: int = 0
    # for how many steps, at most, a request had a block that none of its tokens was in yet
    longest_unfilled: int = 0
    most_blocks: int = 0
    drafted: Counter[str] = field(default_factory=Counter)
    verified: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    # the step that a request was first scheduled in
    first: dict[str, int] = field(default_factory=dict)
    # lengths of placeholders or drafts by request, one a step
    lengths: dict[str, list[int]] = field(default_factory=dict)
    # rounds of a sequence without a draft, by reason
    undrafted: Counter[str] = field(default_factory=Counter)
    allowances: list[Allowance] = field(default_factory=list)


def make_scheduler(vllm_config: VllmConfig, num_blocks: int, is_async: bool) -> Any:
    vllm_config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    kv_cache_config = KVCacheConfig(
        num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    cls = vllm_config.scheduler_config.get_scheduler_cls()
    assert cls.__name__.endswith("AsyncScheduler") == is_async
    return cls(
        vllm_config=vllm_config,
        kv_cache_config=kv_cache_config,
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=BLOCK,
    )


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def is_async(request: pytest.FixtureRequest) -> Iterator[bool]:
    with async_scheduling(request.param):
        yield request.param


@pytest.fixture
def run(engine_config, is_async):
    """`run(sequences, num_blocks, spec)` drives a scheduler until all sequences have ended."""

    def run(sequences: list[Sequence], num_blocks: int, spec: Any = None, wanted: Any = None) -> Seen:
        config = engine_config(
            speculative_config=spec,
            block_size=BLOCK,
            max_num_seqs=16,
            max_model_len=200,
            max_num_batched_tokens=64,
            enable_prefix_caching=False,
        )
        return _drive(make_scheduler(config, num_blocks, is_async), sequences, is_async, spec is not None, wanted)

    return run


def _drive(scheduler: Any, sequences: list[Sequence], is_async: bool, drafts: bool, wanted: Any) -> Seen:
    seen, rng = Seen(), random.Random(1)
    by_id = {str(index): sequence for index, sequence in enumerate(sequences)}
    preempt = scheduler._preempt_request

    def preempt_and_look(request: Request, *rest: Any, **options: Any) -> None:
        seen.in_the_way += sum(_blocks_for_drafts(scheduler, other) for other in (request, *scheduler.running))
        preempt(request, *rest, **options)

    scheduler._preempt_request = preempt_and_look
    unfilled: Counter[tuple[str, int]] = Counter()
    waiting, under_way = dict(by_id), deque[tuple[SchedulerOutput, ModelRunnerOutput]]()
    while waiting or scheduler.has_unfinished_requests():
        for request_id in [r for r, sequence in waiting.items() if sequence.arrival <= seen.steps]:
            sequence = waiting.pop(request_id)
            params = SamplingParams(max_tokens=sequence.output, ignore_eos=True, extra_args=sequence.extra_args)
            params.update_from_generation_config({}, None)
            tokens = [rng.randrange(9, 99) for _ in range(sequence.prompt)]
            scheduler.add_request(Request(request_id, tokens, params, None))
        before = sum(request.num_preemptions for request in scheduler.requests.values())
        output = scheduler.schedule()
        blocks = [(r, n) for r in output.num_scheduled_tokens for n in _unfilled(scheduler, r)]
        unfilled = Counter({block: unfilled[block] + 1 for block in blocks})
        seen.longest_unfilled = max(seen.longest_unfilled, *unfilled.values(), 0)
        for request_id in output.num_scheduled_tokens:
            seen.first.setdefault(request_id, seen.steps)
        seen.preemptions += sum(request.num_preemptions for request in scheduler.requests.values()) - before
        pool = scheduler.kv_cache_manager.block_pool
        seen.most_blocks = max(seen.most_blocks, pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        seen.steps += 1
        assert seen.steps < 5000, "the scheduler makes no progress"
        result = _work(scheduler, output, by_id, rng, seen, wanted)
        if drafts:
            seen.allowances.append(output.del_allowance)
            _check_room(scheduler, output)
            if not is_async and result.req_ids:
                longest = output.del_allowance.longest
                made = [[7] * longest.get(r, LONGEST) for r in result.req_ids]
                seen.drafted.update({r: len(d) for r, d in zip(result.req_ids, made, strict=True)})
                scheduler.update_from_output(output, result)
                scheduler.update_draft_token_ids(DraftTokenIds(list(result.req_ids), made))
                continue
        under_way.append((output, result))
        if len(under_way) > is_async or not output.total_num_scheduled_tokens:
            scheduler.update_from_output(*under_way.popleft())
    if drafts:
        seen.undrafted = scheduler._undrafted
    return seen


def _work(
    scheduler: Any, output: SchedulerOutput, by_id: dict[str, Sequence], rng: random.Random, seen: Seen, wanted: Any
) -> ModelRunnerOutput:
    """What a worker makes of a step: of each request past its prompt the accepted drafts, and one token more."""
    ids, sampled = list(output.num_scheduled_tokens), []
    for request_id in ids:
        request, drafts = scheduler.requests[request_id], output.scheduled_spec_decode_tokens.get(request_id, [])
        if request.is_prefill_chunk:
            sampled.append([])
            continue
        hits = next((i for i in range(len(drafts)) if rng.random() >= by_id[request_id].acceptance), len(drafts))
        sampled.append([5] * (hits + 1))
        seen.verified[request_id] += len(drafts)
        seen.accepted[request_id] += hits
        seen.lengths.setdefault(request_id, []).append(len(drafts))
    result = ModelRunnerOutput(ids, {r: i for i, r in enumerate(ids)}, sampled, None, {}, {})
    if wanted is not None:
        result.del_report = Report(wanted={r: wanted(r) for r in ids})
    return result


def _blocks_for_drafts(scheduler: Any, request: Request) -> int:
    """Blocks beyond those of the request's tokens and of the next one; asynchronously also of the drafts that are being
    verified, which count as its own here."""
    (group,) = scheduler.kv_cache_manager.coordinator.single_type_managers
    tokens = max(request.num_tokens + 1 + (request.num_output_placeholders > 0), request.num_computed_tokens)
    return max(0, len(group.req_to_blocks.get(request.request_id, ())) - -(-tokens // BLOCK))


def _unfilled(scheduler: Any, request_id: str) -> range:
    """Those of its blocks that are beyond its tokens and the one that comes next, whatever is accepted."""
    (group,) = scheduler.kv_cache_manager.coordinator.single_type_managers
    filled = -(-(scheduler.requests[request_id].num_tokens + 1) // BLOCK)
    return range(filled, len(group.req_to_blocks[request_id]))


def _check_room(scheduler: Any, output: SchedulerOutput) -> None:
    """Every request has slots for its drafts, and for the verification of the last of them."""
    (group,) = scheduler.kv_cache_manager.coordinator.single_type_managers
    for request_id in output.num_scheduled_tokens:
        request = scheduler.requests[request_id]
        length = output.del_allowance.longest.get(request_id, LONGEST)
        slots = len(group.req_to_blocks[request_id]) * BLOCK
        assert request.num_computed_tokens + (length + 1 if length else 0) <= slots


def test_drafts_make_fewer_steps(run) -> None:
    sequences = [Sequence(prompt=20, output=40) for _ in range(4)]
    off, on = run(sequences, 100), run(sequences, 100, SPEC)
    assert on.steps < 0.7 * off.steps
    assert all(on.accepted[str(i)] > 0 for i in range(4))


@pytest.mark.parametrize("seed", range(8))
def test_no_preemption_where_all_sequences_fit(seed: int, run) -> None:
    """As many blocks as the sequences have at their ends: not one is left for a draft, and none is missed."""
    rng = random.Random(seed)
    sequences = [
        Sequence(rng.randint(1, 60), rng.randint(2, 80), rng.choice([0.0, 0.5, 0.9, 1.0]), rng.randint(0, 30))
        for _ in range(rng.randint(2, 8))
    ]
    blocks = sum(-(-(sequence.prompt + sequence.output - 1) // BLOCK) for sequence in sequences)
    on = run(sequences, blocks + 1, SPEC)  # one is vLLM's own
    assert on.preemptions == 0
    assert on.most_blocks <= blocks
    assert sum(on.verified.values()) > 0


@pytest.mark.parametrize("longest_prompt", [50, 150], ids=["prompts of a chunk", "of up to three"])
def test_hardly_a_preemption_that_off_would_not_have_had(run, longest_prompt: int) -> None:
    """Sixty crowds that do not fit. Who drafts gets on faster than its neighbours, so that steps cannot be compared one
    by one; but where off preempts nobody of these crowds no draft makes it happen while prompts are short, over all
    crowds no more are preempted, and hardly a block is held for a draft while one is.
    """
    longest_output = min(80, 200 - longest_prompt)
    without = with_drafts = in_the_way = quiet = accepted = 0
    for seed in range(60):
        rng = random.Random(seed)
        sequences = [
            Sequence(
                rng.randint(1, longest_prompt),
                rng.randint(5, longest_output),
                rng.choice([0.3, 0.9]),
                rng.randint(0, 80),
            )
            for _ in range(rng.randint(4, 14))
        ]
        # At least as many as the longest sequence has, and one of vLLM's own.
        blocks = rng.randint(max(12, 1 + -(-(longest_prompt + longest_output) // BLOCK)), 30)
        off, on = run(sequences, blocks), run(sequences, blocks, SPEC)
        without, with_drafts = without + off.preemptions, with_drafts + on.preemptions
        accepted += on.accepted.total()
        in_the_way += on.in_the_way
        quiet += off.preemptions == 0
        if longest_prompt == 50:
            assert off.preemptions or not on.preemptions, f"crowd {seed}"
        assert not off.in_the_way
    assert without > 20
    assert quiet > 10
    assert accepted > 1000
    assert with_drafts <= without
    assert in_the_way <= 0.02 * with_drafts


def test_how_long_a_block_for_drafts_is_not_filled(run, is_async) -> None:
    """As long as the reserve for the others lasts, and no longer: of drafts that are never accepted."""
    ahead = int(is_async)
    seen = max(
        run([Sequence(prompt, 60, acceptance=0.0)], 100, SPEC).longest_unfilled for prompt in range(1, 1 + BLOCK)
    )
    assert slots_for(LONGEST, ahead) < seen <= steps_to_fill(LONGEST, ahead)


def test_a_waiting_request_is_let_in_although_others_draft(run) -> None:
    """Blocks that drafts hold in reserve are handed over as soon as somebody waits for them."""
    waits = []
    for arrival in range(3, 14):
        on = run([Sequence(30, 60), Sequence(30, 60), Sequence(64, 10, arrival=arrival)], 6 + 6 + 5 + 1, SPEC)
        assert on.preemptions == 0
        assert on.accepted.total() > 20
        waits.append(on.first["2"] - arrival)
    assert max(waits) <= LONGEST + 2
    assert min(waits) == 0


def test_the_last_chunk_of_a_prompt_may_draft_where_there_is_room(run) -> None:
    """It is no prompt under way for itself: two blocks of its own, one for the draft, and one in reserve are enough."""
    on = run([Sequence(158, 20)], 10 + 1 + 1 + 1, SPEC)
    assert on.lengths["0"][:2] == [0, LONGEST]


def test_a_request_that_opts_out_drafts_nothing_beside_others_that_do(run) -> None:
    wishes = [None, {"del": {"enabled": False}}, {"del": {"max_draft": 2}}, {"del": '{"max_draft": 0}'}]
    on = run([Sequence(20, 40, extra_args=wish) for wish in wishes], 100, SPEC)
    assert [max(on.lengths[str(i)]) for i in range(4)] == [LONGEST, 0, 2, 0]
    assert on.accepted["0"] > on.accepted["2"] > 0


def test_reasons_of_rounds_without_a_draft(run) -> None:
    """A request that allows none; two that end with their last token; and three for whose drafts there is no room."""
    out = {"del": {"enabled": False}}
    assert set(run([Sequence(20, 10, extra_args=out)], 100, SPEC).undrafted) == {"not_wanted"}
    assert set(run([Sequence(20, 1), Sequence(20, 2)], 100, SPEC).undrafted) == {"ends"}
    on = run([Sequence(10, 22, acceptance=0.0)] * 3, 3 * 2 + 1, SPEC)
    assert on.preemptions == 0
    assert set(on.undrafted) == {"no_room", "ends"}
    # None is made for who wants no drafts, and that is no want of room.
    idle = run([Sequence(10, 60, acceptance=0.0)] * 3, 100, SPEC, wanted=lambda _: 0)
    assert set(idle.undrafted) == {"does_not_pay", "ends"}


def test_what_requests_allow_is_told_apart_from_what_there_is_room_for(run) -> None:
    """So that a worker plans by what lasts."""
    wishes = [None, {"del": {"enabled": False}}, {"del": {"max_draft": 2}}]
    on = run([Sequence(10, 40, extra_args=wish) for wish in wishes], 100, SPEC, wanted=lambda _: 0)
    decoding = [allowance for allowance in on.allowances if "0" in allowance.longest and len(allowance.wished) == 2]
    assert decoding
    assert all(allowance.wished == {"1": 0, "2": 2} for allowance in decoding)
    assert {allowance.longest["0"] for allowance in decoding} >= {0, 1}


def test_no_draft_past_the_end(run, is_async) -> None:
    """Of drafts that are all accepted, no more are verified than are wanted; asynchronously, two steps later."""
    on = run([Sequence(20, 24, acceptance=1.0)], 100, SPEC)
    assert 18 <= on.verified["0"] <= (23 + 2 * LONGEST if is_async else 23)
    assert run([Sequence(20, 1), Sequence(20, 2)], 100, SPEC).verified.total() == 0


def test_placeholders_are_as_many_as_the_worker_wants(run, is_async) -> None:
    """Reported step by step; a new request gets what is usual until the worker has said something about it."""
    on = run([Sequence(20, 40), Sequence(20, 40)], 100, SPEC, wanted=lambda request_id: 3 * int(request_id))
    if is_async:
        assert set(on.lengths["0"][4:]) == {0}
        assert set(on.lengths["1"][4:-3]) == {3}
    late = run([Sequence(20, 60), Sequence(20, 20, arrival=12)], 100, SPEC, wanted=lambda _: 2)
    if is_async:
        assert set(late.lengths["1"]) <= {0, 2}


def test_another_scheduler_stays_the_users(engine_config) -> None:
    config = engine_config(speculative_config="del", scheduler_cls="vllm.v1.core.sched.scheduler.Scheduler")
    assert config.scheduler_config.scheduler_cls == "vllm.v1.core.sched.scheduler.Scheduler"
