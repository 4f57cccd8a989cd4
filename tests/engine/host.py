"""A child process that runs vLLM engines in one of its two model runners, and the handle on it.

Which runner vLLM uses, and whether Triton kernels run in the interpreter, is fixed when vLLM is imported: so each
runner has a process of its own. Engines are kept and reused there, as many tests ask for the same one.
"""

import dataclasses
import json
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.engine.interpreter import (
    allow_triton_attention,
    avoid_uninterpretable_kernels,
    read_the_head_in_large_blocks,
    use_triton_interpreter,
)

RUNNERS = ("v1", "v2")

LENGTHS = (1, 2, 3, 4, 6, 9, 16)
"""Largest draft lengths to draw from."""

Prompt = Sequence[int] | str


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request that arrives before engine step `step`, and is aborted before step `abort_at` if that is set."""

    prompt: Prompt
    sampling: dict[str, Any]
    step: int = 0
    abort_at: int | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """One completion, as a user sees it. `logprobs`: per token, the (token, rank, value) triples."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None
    stop_reason: Any
    logprobs: tuple[tuple[tuple[int, int, float], ...], ...] = dataclasses.field(default=(), compare=False)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run gave: completions by request and index, and what the scheduler counted."""

    completions: tuple[tuple[Completion, ...], ...]
    # rounds of a request that verified drafts, and how many tokens these were, and were accepted
    rounds: int
    drafted: int
    accepted: int
    # the most drafts of a request in a round
    longest: int
    preemptions: int
    steps: int
    cached_tokens: int


class Host:
    """The handle: calls run in the child, one at a time."""

    def __init__(self, runner: str) -> None:
        self.runner = runner
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_prepare, initargs=(runner,))

    def generate(
        self, model: str, prompts: Sequence[Prompt], sampling: Any, spec: Any = None, **engine: Any
    ) -> Outcome:
        """All `prompts` at once; `sampling` is one dict for all, or one each."""
        each = [sampling] * len(prompts) if isinstance(sampling, dict) else sampling
        return self.serve(model, [Arrival(p, s) for p, s in zip(prompts, each, strict=True)], spec, **engine)

    def serve(
        self, model: str, arrivals: Sequence[Arrival], spec: Any = None, plans: int | None = None, **engine: Any
    ) -> Outcome:
        """Drive `LLMEngine.step` by hand over `arrivals`. With `plans`, a seed, the dynamic policy draws its plans."""
        return self.call(_serve, model, tuple(arrivals), spec, engine, plans)

    def call(self, function: Callable, *args: Any) -> Any:
        return self._pool.submit(function, *args).result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


ENGINE_DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 128,
    "block_size": 32,
    "num_gpu_blocks_override": 80,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
    "gpu_memory_utilization": 0.02,
    "kv_cache_memory_bytes": 1 << 26,
    "seed": 0,
}
_ENGINES_KEPT = 6

# What the planner goes by: a step costs what its layers do. Real figures of these tiny models, in an interpreter even,
# would have it draft nothing.
_ROWS, _TOKENS = (1, 8), (1, 136)
COSTS = {
    "rows": _ROWS,
    "step": 0.1,
    "layer": (0.5, 0.6),
    "head_rows": _ROWS,
    "head": (0.5, 0.6),
    "tokens": _TOKENS,
    "verify": (6.0, 9.0),
}
_engines: "OrderedDict[str, Any]" = OrderedDict()


def _prepare(runner: str) -> None:
    """The child's environment, before it imports vLLM."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
    )
    if runner == "v2":
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
        use_triton_interpreter()


def _engine(model: str, spec: Any, options: dict[str, Any]) -> Any:
    """The engine for these options, from the kept ones or new."""
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    if os.environ.get("TRITON_INTERPRET"):
        allow_triton_attention()
        avoid_uninterpretable_kernels()
        read_the_head_in_large_blocks()
    _use_made_up_costs()
    _look_at_models_here()
    if _engines:
        _rebind_no_kernels()
    key = repr((model, spec, sorted(options.items())))
    if key in _engines:
        _engines.move_to_end(key)
        return _engines[key]
    kept = _ENGINES_KEPT if _may_join(model) else 1
    while len(_engines) >= kept:
        _engines.popitem(last=False)[1].engine_core.shutdown()
    options = {**ENGINE_DEFAULTS, **options}
    # As vLLM has it where each runner is at home: V2 on a GPU schedules asynchronously, V1 on a CPU does not.
    with async_scheduling(bool(options.pop("async_scheduling", "TRITON_INTERPRET" in os.environ))):
        config = dict(spec) if isinstance(spec, dict) else spec
        _engines[key] = LLMEngine.from_engine_args(EngineArgs(model=model, speculative_config=config, **options))
    return _engines[key]


def _may_join(model: str) -> bool:
    """Whether the engines of this process may stay: vLLM makes the group of ranks that share experts with the first one
    only, if that is of a mixture of experts."""
    from vllm.distributed import parallel_state

    config = json.loads(Path(model, "config.json").read_text())
    has_experts = bool({"num_experts", "num_local_experts"} & config.keys())
    return not has_experts or parallel_state._EP is not None


def _use_made_up_costs() -> None:
    from vllm_del.draft.clock import Stopwatch
    from vllm_del.engine import setup
    from vllm_del.policy.cost import MeasuredCosts

    setup.costs_of = lambda *_: MeasuredCosts(**COSTS)
    # The clock knows better, and says something else on each machine.
    Stopwatch._learn = lambda *_: None  # type: ignore[method-assign]


def _look_at_models_here() -> None:
    """What a model's class can do, vLLM asks a new process, once for each class: there may be a GPU. Here is none."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda ask: ask()


def _rebind_no_kernels() -> None:
    """Without Triton each engine looks for kernels to replace in all of Python's modules. The first has done it."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.register_triton_kernel_overrides = classmethod(lambda cls: None)


@contextmanager
def async_scheduling(wanted: bool) -> Iterator[None]:
    """The CPU platform switches asynchronous scheduling off; inside, it is what the test says."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.__dict__["check_and_update_config"]

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        original.__func__(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    try:
        yield
    finally:
        CpuPlatform.check_and_update_config = original


@contextmanager
def _drawn_plans(seed: int | None) -> Iterator[None]:
    """Inside, every row of every round leaves at an exit, after a length and below a confidence that are drawn."""
    import torch

    from vllm_del.draft.decide import DynamicPolicy
    from vllm_del.draft.loop import Plan

    original, wanted = DynamicPolicy.plan, DynamicPolicy.wanted
    random = torch.Generator().manual_seed(seed or 0)
    most = LENGTHS[int(torch.randint(len(LENGTHS), (1,), generator=random))]

    def plan(self: DynamicPolicy, slots: Any, wished: Any, limit: Any, context: Any) -> Plan:
        rows, deepest = len(limit), len(self._depths) - 1
        # The scheduler hears of these lengths, not of those that the policy chooses.
        self.drawn = torch.minimum(wished, torch.randint(most + 1, (rows,), generator=random))
        original(self, slots, wished, limit, context)
        exit = torch.randint(deepest + 1, (rows,), generator=random)
        length = torch.minimum(limit, self.drawn)
        # Now and then none is too low.
        below = torch.rand(rows, generator=random) - 0.5
        return Plan(exit, length, below.where(below > 0, torch.nan), deepest, min(most, self.max_length))

    if seed is not None:
        DynamicPolicy.plan = plan  # type: ignore[method-assign]
        DynamicPolicy.wanted = property(lambda self: self.drawn)  # type: ignore[assignment]
    try:
        yield
    finally:
        DynamicPolicy.plan = original  # type: ignore[method-assign]
        DynamicPolicy.wanted = wanted  # type: ignore[method-assign]


def _serve(
    model: str, arrivals: tuple[Arrival, ...], spec: Any, options: dict[str, Any], plans: int | None = None
) -> Outcome:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = _engine(model, spec, options)
    scheduler = engine.engine_core.engine_core.scheduler
    counted = _Counted(scheduler)
    completions: list[dict[int, Any]] = [{} for _ in arrivals]
    cached_tokens = [0] * len(arrivals)
    waiting = dict(enumerate(arrivals))
    alive: set[str] = set()
    step = 0
    with counted, _drawn_plans(plans):
        while waiting or engine.has_unfinished_requests():
            for index in [i for i, arrival in waiting.items() if arrival.step <= step]:
                arrival = waiting.pop(index)
                prompt = arrival.prompt
                text_or_ids = prompt if isinstance(prompt, str) else {"prompt_token_ids": list(prompt)}
                params = SamplingParams(**arrival.sampling, output_kind=RequestOutputKind.CUMULATIVE)
                engine.add_request(str(index), text_or_ids, params)
                alive.add(str(index))
            doomed = [i for i in alive if arrivals[int(i)].abort_at is not None and arrivals[int(i)].abort_at <= step]
            engine.abort_request(doomed)
            alive.difference_update(doomed)
            for output in engine.step():
                index = int(output.request_id)
                completions[index] |= {completion.index: completion for completion in output.outputs}
                cached_tokens[index] = output.num_cached_tokens or 0
                if output.finished:
                    alive.discard(output.request_id)
            step += 1
            assert step < 20_000, "the engine makes no progress"
    engine.reset_prefix_cache()
    return Outcome(
        completions=tuple(tuple(_completion(by_index[i]) for i in sorted(by_index)) for by_index in completions),
        rounds=counted.counts["rounds"],
        drafted=counted.counts["drafted"],
        accepted=counted.counts["accepted"],
        longest=counted.counts["longest"],
        preemptions=counted.counts["preempted"],
        steps=step,
        cached_tokens=sum(cached_tokens),
    )


def _completion(output: Any) -> Completion:
    return Completion(
        token_ids=tuple(output.token_ids),
        text=output.text,
        finish_reason=output.finish_reason,
        stop_reason=output.stop_reason,
        logprobs=tuple(
            tuple((token, entry.rank, entry.logprob) for token, entry in sorted(position.items()))
            for position in output.logprobs or ()
        ),
    )


class _Counted:
    """Counts what a scheduler drafts, accepts and preempts, at the calls where it does."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> None:
        stats, preempt = self.scheduler.make_spec_decoding_stats, self.scheduler._preempt_request

        def make_spec_decoding_stats(
            spec_decoding_stats: Any, num_draft_tokens: int, num_accepted_tokens: int, *args: Any, **kwargs: Any
        ) -> Any:
            self.counts["rounds"] += 1
            self.counts["drafted"] += num_draft_tokens
            self.counts["accepted"] += num_accepted_tokens
            self.counts["longest"] = max(self.counts["longest"], num_draft_tokens)
            return stats(spec_decoding_stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs)

        def preempt_request(*args: Any, **kwargs: Any) -> Any:
            self.counts["preempted"] += 1
            return preempt(*args, **kwargs)

        self.scheduler.make_spec_decoding_stats = make_spec_decoding_stats
        self.scheduler._preempt_request = preempt_request

    def __exit__(self, *_: Any) -> None:
        del self.scheduler.make_spec_decoding_stats, self.scheduler._preempt_request
