"""Engines in one process, and the contenders of the benchmark, which take turns on them. To be imported before vLLM."""

import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from statistics import harmonic_mean
from typing import Any

# Read when vLLM is imported: engines side by side in this process, on all its cores.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)

from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind
from workloads import Request

from vllm_del.draft.tally import Counts
from vllm_del.policy.cost import Correction

SLICE = 48
"""Tokens of each place after which the next contender goes on: a machine may be half as fast again within seconds."""


class Engine:
    """vLLM, and what its scheduler is told."""

    def __init__(self, model: str, spec: dict[str, Any] | None, **engine: Any) -> None:
        self.llm = LLM(
            model,
            speculative_config=spec,
            max_model_len=1024,
            max_num_seqs=16,
            enable_prefix_caching=False,
            # Engines are many, and a machine that is short of memory is slow in its own way.
            kv_cache_memory_bytes=1 << 29,
            disable_log_stats=True,
            **engine,
        )
        self.drafted = self.accepted = 0
        # What a policy counted, every few rounds.
        self.counts: list[Counts] = []
        self._count(self.llm.llm_engine.engine_core.engine_core.scheduler)

    def _count(self, scheduler: Any) -> None:
        original, update = scheduler.make_spec_decoding_stats, scheduler.update_from_output

        def counted(stats: Any, num_draft_tokens: int, num_accepted_tokens: int, *args: Any, **kwargs: Any) -> Any:
            self.drafted += num_draft_tokens
            self.accepted += num_accepted_tokens
            return original(stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs)

        def updated(scheduler_output: Any, model_runner_output: Any) -> Any:
            report = getattr(model_runner_output, "del_report", None)
            if report is not None and report.counts is not None:
                self.counts.append(report.counts)
            return update(scheduler_output, model_runner_output)

        scheduler.make_spec_decoding_stats, scheduler.update_from_output = counted, updated


def _policy(worker: Any) -> Any:
    return getattr(getattr(worker.model_runner, "drafter", None), "policy", None)


def _pause(worker: Any) -> None:
    """In the worker: a policy that holds rounds against the clock leaves out the one that others went between."""
    if (stopwatch := getattr(_policy(worker), "stopwatch", None)) is not None:
        stopwatch.pause()


def _correction(worker: Any) -> Correction | None:
    """In the worker: what the clock said of the tables of costs in the last rounds, if a policy goes by these."""
    planner = getattr(_policy(worker), "planner", None)
    return planner and replace(planner.costs.correction)


@dataclass
class Contender:
    """A way to draft on one of the engines, and what it made of a workload so far."""

    name: str
    engine: Engine
    # The longest draft that requests allow
    longest: int
    # By turn: tokens a second
    rates: list[float] = field(default_factory=list)
    # Of all turns: tokens drafted, accepted and generated, and the texts
    drafted: int = 0
    accepted: int = 0
    generated: int = 0
    texts: list[list[int]] = field(default_factory=list)
    # What the policy knew of the costs when a place was last left empty
    correction: Correction | None = None

    def turn(self, places: int, requests: list[Request]) -> Iterator[None]:
        """Serve them once, a slice for each `next`. Timed for as long as every place is taken."""
        engine, waiting, alive, generated = self.engine.llm.llm_engine, deque(enumerate(requests)), 0, 0
        drafted, accepted = self.engine.drafted, self.engine.accepted
        texts: list[list[int]] = [[] for _ in requests]
        rate, seconds, begin, slice_end = None, 0.0, time.perf_counter(), SLICE * places
        while alive or waiting:
            while waiting and alive < places:
                number, request = waiting.popleft()
                params = SamplingParams(
                    temperature=0,
                    max_tokens=request.length,
                    ignore_eos=True,
                    detokenize=False,
                    output_kind=RequestOutputKind.DELTA,
                    extra_args={"del": {"max_draft": self.longest}},
                )
                engine.add_request(str(number), {"prompt_token_ids": request.token_ids}, params)
                alive += 1
            for output in engine.step():
                texts[int(output.request_id)] += output.outputs[0].token_ids
                generated += len(output.outputs[0].token_ids)
                alive -= output.finished
            if rate is None and not waiting and alive < places:
                rate = generated / (seconds + time.perf_counter() - begin)
                (self.correction,) = self.engine.llm.collective_rpc(_correction)
            if generated >= slice_end:
                slice_end += SLICE * places
                seconds += time.perf_counter() - begin
                yield
                self.engine.llm.collective_rpc(_pause)
                begin = time.perf_counter()
        assert rate is not None
        self.rates.append(rate)
        self.texts += texts
        self.generated += generated
        self.drafted += self.engine.drafted - drafted
        self.accepted += self.engine.accepted - accepted

    def anew(self) -> "Contender":
        """The same, with nothing behind it."""
        return Contender(self.name, self.engine, self.longest)

    @property
    def rate(self) -> float:
        """Tokens a second: the harmonic mean of the turns."""
        return harmonic_mean(self.rates)

    def figures(self, off: "Contender") -> dict[str, Any]:
        """What it did, beside one that drafts nothing."""
        same = sum(a == b for a, b in zip(self.texts, off.texts, strict=True))
        return {
            "tokens_per_second": round(self.rate, 1),
            "speed_up": round(self.rate / off.rate, 3),
            "by_turn": [round(a / b, 2) for a, b in zip(self.rates, off.rates, strict=True)],
            "accepted_of_drafted": round(self.accepted / self.drafted, 3) if self.drafted else None,
            "drafted_a_token": round(self.drafted / self.generated, 2),
            "same_output": f"{same} of {len(self.texts)}",
        }


def take_turns(
    contenders: list[Contender], turns: Iterable[tuple[int, list[Request]]], tell: Callable[[Contender], None]
) -> None:
    """All of them take each turn side by side, slice by slice, in another order each time; each on its own engine.

    `tell` hears who is done.
    """
    assert len({id(contender.engine) for contender in contenders}) == len(contenders)
    for number, (places, requests) in enumerate(turns):
        order = random.Random(number).sample(contenders, len(contenders))
        waiting = deque((each, each.turn(places, requests)) for each in order)
        while waiting:
            contender, turn = waiting.popleft()
            if next(turn, waiting) is waiting:
                tell(contender)
            else:
                waiting.append((contender, turn))
