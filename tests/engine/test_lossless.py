"""Greedy output in float32 equals that of the same vLLM without speculation, token for token."""

from pathlib import Path
from typing import Any

import pytest

from tests.engine.checkpoints import EOS, checkpoint
from tests.engine.host import Arrival, Host, Outcome

GREEDY = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
PROMPTS = [[5], [7, 8, 9, 10, 11], list(range(20, 70)), [9, 4, 88] * 50]
SPEC = {"method": "del", "del_exit_layers": [1, 2, 3], "num_speculative_tokens": 4}
# Drafts as many tokens in every round: what falls inside a draft is then known.
FIXED = {"method": "del", "del_policy": "fixed", "del_exit_layers": 3, "num_speculative_tokens": 4}

# All of the context, the last tokens of it, and layers of both kinds, in two groups of the KV cache.
ATTENTION = [("llama", SPEC), ("mistral-sliding", SPEC), ("gemma2", FIXED)]
# Too few for six sequences of 131 tokens.
FEW_BLOCKS = {"llama": 14, "mistral-sliding": 8, "gemma2": 20}

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model(checkpoints: Path) -> str:
    return checkpoint(checkpoints, "llama")


def both(
    host: Host, model: str, prompts: Any, sampling: Any, spec: Any = None, **engine: Any
) -> tuple[Outcome, Outcome]:
    """(off, del) for the same requests; asserts equal completions and that drafts were accepted."""
    off = host.generate(model, prompts, sampling, **engine)
    on = host.generate(model, prompts, sampling, spec or SPEC, **engine)
    assert on.completions == off.completions
    assert on.accepted > 0
    return off, on


def test_batch_of_prompts_of_one_token_and_of_several_chunks(host: Host, model: str) -> None:
    off, on = both(host, model, PROMPTS, GREEDY, max_num_batched_tokens=48)
    assert on.steps < off.steps


@pytest.mark.parametrize("host", ["v2"], indirect=True)
def test_synchronous_scheduling(host: Host, model: str) -> None:
    """V2's other tests schedule asynchronously, which is its default on a GPU."""
    both(host, model, PROMPTS, GREEDY, max_num_batched_tokens=48, async_scheduling=False)


@pytest.mark.parametrize("exit_layer", [1, 3])
@pytest.mark.parametrize("num_tokens", [1, 16])
def test_extreme_exits_and_lengths(host: Host, model: str, exit_layer: int, num_tokens: int) -> None:
    spec = {"method": "del", "del_policy": "fixed", "del_exit_layers": exit_layer, "num_speculative_tokens": num_tokens}
    _, on = both(host, model, PROMPTS, GREEDY, spec)
    assert on.longest == num_tokens


@pytest.mark.parametrize(
    ("architecture", "spec", "caching"), [("llama", SPEC, False), *((*attention, True) for attention in ATTENTION)]
)
def test_shared_prefixes(host: Host, checkpoints: Path, architecture: str, spec: dict[str, Any], caching: bool) -> None:
    """Later requests reuse cached blocks of earlier ones; a draft must not have spoilt them."""
    model = checkpoint(checkpoints, architecture)
    prefix = [(7 * i) % 150 + 5 for i in range(100)]
    arrivals = [Arrival(prefix + [10 + i], GREEDY, step=6 * i) for i in range(5)]
    arrivals += [Arrival(prefix[:70], GREEDY, step=40)]
    off = host.serve(model, arrivals, enable_prefix_caching=caching)
    on = host.serve(model, arrivals, spec, enable_prefix_caching=caching)
    assert on.completions == off.completions
    assert on.accepted > 0
    assert (on.cached_tokens > 0) == caching
    assert on.cached_tokens == off.cached_tokens


def test_generated_text_served_again_from_the_prefix_cache(host: Host, model: str) -> None:
    """Blocks cached while generating with drafts hold what the target computes: a second turn reuses them."""
    (first,) = host.generate(model, [PROMPTS[2]], GREEDY).completions[0]
    turns = [Arrival(PROMPTS[2], GREEDY), Arrival([*PROMPTS[2], *first.token_ids], GREEDY, step=60)]
    off = host.serve(model, turns)
    on = host.serve(model, turns, SPEC, enable_prefix_caching=True)
    assert on.completions == off.completions
    assert on.cached_tokens >= 64
    assert on.accepted > 0


@pytest.mark.parametrize(("architecture", "spec"), ATTENTION)
@pytest.mark.parametrize("caching", [False, True])
def test_preemption(host: Host, checkpoints: Path, architecture: str, spec: dict[str, Any], caching: bool) -> None:
    """A KV cache so small that requests are preempted and resumed, on blocks cached while drafting too."""
    preempt(host, checkpoints, architecture, spec, enable_prefix_caching=caching)


@pytest.mark.parametrize("host", ["v2"], indirect=True)
def test_preemption_between_synchronous_steps(host: Host, checkpoints: Path) -> None:
    preempt(host, checkpoints, "mistral-sliding", SPEC, enable_prefix_caching=True, async_scheduling=False)


def preempt(host: Host, checkpoints: Path, architecture: str, spec: dict[str, Any], **options: Any) -> None:
    model = checkpoint(checkpoints, architecture)
    prompts = [[10 + i, *range(30, 60)] for i in range(6)]
    sampling = {**GREEDY, "max_tokens": 100}
    off = host.generate(model, prompts, sampling)
    few = {"num_gpu_blocks_override": FEW_BLOCKS[architecture], "max_model_len": 160}
    on = host.generate(model, prompts, sampling, spec, **few, **options)
    assert on.completions == off.completions
    assert on.preemptions > 0
    assert on.accepted > 0


@pytest.mark.parametrize("beside", [[], [20]], ids=["alone", "beside one that goes on"])
def test_longest_length_reached_inside_a_draft(host: Host, model: str, beside: list[int]) -> None:
    """Sequences end at max_model_len at different points of a draft."""
    prompts = [[length, *PROMPTS[3][1:length]] for length in (86, 87, 88, 89, 90, 91, *beside)]
    sampling = {**GREEDY, "max_tokens": 60}
    _, on = both(host, model, prompts, sampling, {**FIXED, "num_speculative_tokens": 7}, max_model_len=96)
    assert [len(c[0].token_ids) for c in on.completions] == [10, 9, 8, 7, 6, 5, *(60 for _ in beside)]


def test_one_long_sequence_does_not_stop_the_others_drafting(host: Host, model: str) -> None:
    """vLLM's V1 runner would stop drafting for the batch while one sequence is near max_model_len."""
    near_the_end = Arrival(list(range(5, 93)), {**GREEDY, "max_tokens": 8})
    other = Arrival([7, 8, 9], {**GREEDY, "max_tokens": 16})
    spec = {**FIXED, "num_speculative_tokens": 7}
    on = host.serve(model, [near_the_end, other], spec, max_model_len=96)
    alone = host.serve(model, [other], spec, max_model_len=96)
    assert on.completions[1] == alone.completions[0]
    assert on.accepted >= alone.accepted > 0


def test_stop_strings_and_stop_tokens_inside_a_draft(host: Host, model: str) -> None:
    (free,) = host.generate(model, [PROMPTS[1]], GREEDY).completions[0]
    tokens = [free.token_ids[at] for at in (7, 8, 9, 10, 11)]
    for stops in ([{"stop_token_ids": [token]} for token in tokens], [{"stop": [f"w{token}"]} for token in tokens]):
        sampling = [{**GREEDY, **stop} for stop in stops]
        _, on = both(host, model, [PROMPTS[1]] * len(sampling), sampling, FIXED)
        assert {c[0].finish_reason for c in on.completions} == {"stop"}
        assert {type(c[0].stop_reason) for c in on.completions} == {int if "stop_token_ids" in stops[0] else str}
        if "stop_token_ids" in stops[0]:
            # More was accepted than was put out. (A stop string is found after the round, by the front end.)
            rounds = on.rounds + len(on.completions)
            assert on.accepted + rounds > sum(len(c[0].token_ids) for c in on.completions)
    late = [{**GREEDY, "stop": [f"w{token}"], "min_tokens": 12} for token in tokens]
    both(host, model, [PROMPTS[1]] * len(late), late, FIXED)


@pytest.mark.parametrize("ignore", [False, True])
def test_end_of_sequence_inside_a_draft(host: Host, checkpoints: Path, ignore: bool) -> None:
    """Generation ends at the model's own end token, wherever in a draft it falls, but with `ignore_eos` goes on."""
    ends = [EOS, 20, 40, 60, 80, 100, 120, 140]
    model = checkpoint(checkpoints, "llama", eos_token_id=ends)
    prompts = [[4 + 7 * i, 150 - 5 * i] for i in range(16)]
    _, on = both(host, model, prompts, {"temperature": 0, "max_tokens": 40, "ignore_eos": ignore}, FIXED)
    texts = [c[0].token_ids for c in on.completions]
    if ignore:
        assert {len(text) for text in texts} == {40}
        assert sum(bool(set(ends) & set(text[:-1])) for text in texts) > 4
    else:
        assert len({len(c[0].token_ids) for c in on.completions if c[0].finish_reason == "stop"}) > 4
        assert on.accepted + on.rounds + len(texts) > sum(map(len, texts))


def test_several_completions_of_a_prompt(host: Host, model: str) -> None:
    """vLLM allows n > 1 when sampling only; sampling the one most likely token makes that exact."""
    _, on = both(host, model, PROMPTS[:2], {**GREEDY, "temperature": 1.0, "top_k": 1, "n": 2})
    assert [len(c) for c in on.completions] == [2, 2]


def test_logprobs(host: Host, model: str) -> None:
    """Log probabilities of drafted tokens are the target's, and the alternatives beside them too."""
    off, on = both(host, model, PROMPTS[:3], {**GREEDY, "logprobs": 3})
    for expected, actual in zip(off.completions, on.completions, strict=True):
        for there, here in zip(expected[0].logprobs, actual[0].logprobs, strict=True):
            assert [(token, rank) for token, rank, _ in here] == [(token, rank) for token, rank, _ in there]
            assert [value for *_, value in here] == pytest.approx([value for *_, value in there], abs=1e-3)


def test_penalties(host: Host, model: str) -> None:
    """What changes the target's choice with the text so far holds inside a draft as well."""
    sampling = [
        {**GREEDY, "repetition_penalty": 1.3},
        {**GREEDY, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {**GREEDY, "bad_words": ["w25", "w30 w31"]},
        {**GREEDY, "min_tokens": 20, "ignore_eos": False},
    ]
    both(host, model, PROMPTS, sampling)


def test_seeded_samples_come_again(host: Host, model: str) -> None:
    sampling = {**GREEDY, "temperature": 1.0, "seed": 7}
    runs = [host.generate(model, PROMPTS[:2], sampling, FIXED) for _ in range(2)]
    assert runs[0].completions == runs[1].completions
    assert runs[0].accepted > 0


def test_a_scheduler_of_the_users_own(host: Host, model: str) -> None:
    """It sizes no drafts: each round has as many as there may be."""
    own = "vllm.v1.core.sched.scheduler.Scheduler"
    off = host.generate(model, PROMPTS, GREEDY)
    on = host.generate(model, PROMPTS, GREEDY, FIXED, scheduler_cls=own, async_scheduling=False)
    assert on.completions == off.completions
    assert on.accepted > 0


def test_arrivals_and_aborts_in_flight(host: Host, model: str) -> None:
    arrivals = [
        Arrival(PROMPTS[0], GREEDY),
        Arrival(PROMPTS[3], GREEDY, abort_at=9),
        Arrival(PROMPTS[1], GREEDY, step=2),
        Arrival(PROMPTS[2], GREEDY, step=3, abort_at=5),
        Arrival([99, 98], GREEDY, step=5),
        Arrival(PROMPTS[2], GREEDY, step=9),
    ]
    off = host.serve(model, arrivals, max_num_batched_tokens=64)
    on = host.serve(model, arrivals, SPEC, max_num_batched_tokens=64)
    for arrival, expected, actual in zip(arrivals, off.completions, on.completions, strict=True):
        if arrival.abort_at is None:
            assert actual == expected
        elif actual and expected:  # what came before the abort: del may have got further by then
            shorter = min(len(actual[0].token_ids), len(expected[0].token_ids))
            assert actual[0].token_ids[:shorter] == expected[0].token_ids[:shorter]
    assert on.accepted > 0
