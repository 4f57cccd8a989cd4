"""What is drafted is what the model, cut off at the exit layer, would say after the same text."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm.config import ReasoningConfig

from tests.engine import host as engines
from tests.engine.checkpoints import VOCAB, checkpoint
from tests.engine.host import RUNNERS, Host
from vllm_del.draft.clock import Pace

PROMPT = [11, 45, 7, 7, 102, 9, 64, 33]
# Of one token, of a few, and of several chunks of 48.
PROMPTS = [[5], PROMPT, [(7 * i) % 150 + 5 for i in range(100)]]
LENGTH = 48
GREEDY = {"temperature": 0, "max_tokens": LENGTH, "ignore_eos": True}

pytestmark = pytest.mark.engine


CASES = [("llama", 1, 4), ("llama", 3, 6), ("gemma2", 2, 3), ("gemma3", 2, 3)]
MORE_ON_V1 = ["llama-tied", "mistral-sliding", "qwen2", "qwen3", "mixtral", "phi3"]


@pytest.mark.parametrize(
    ("host", "architecture", "exit_layer", "num_tokens"),
    [
        *((runner, *case) for runner in RUNNERS for case in CASES),
        *(("v1", architecture, 2, 3) for architecture in MORE_ON_V1),
    ],
    indirect=["host"],
    scope="session",  # as one argument is not the fixture's, it would be made anew for each test
)
def test_drafts_are_those_of_the_truncated_model(
    host: Host, checkpoints: Path, architecture: str, exit_layer: int, num_tokens: int
) -> None:
    """Counts of drafted and accepted tokens equal those of an independent simulation, without KV cache.

    Wrong positions, a stale or misplaced KV entry or a wrong exit would still be lossless, and lower these counts.
    Gemma's layers have a window or not in turn, so its early ones are in two KV cache groups.
    """
    model = checkpoint(checkpoints, architecture)
    spec = {"method": "del", "del_policy": "fixed", "del_exit_layers": exit_layer, "num_speculative_tokens": num_tokens}
    outcome = host.generate(model, PROMPTS, GREEDY, spec, max_num_batched_tokens=48)
    texts = [(*prompt, *c.token_ids) for prompt, (c,) in zip(PROMPTS, outcome.completions, strict=True)]
    # Scheduling asynchronously, as V2 does, what a step brought is not known yet when the next one is scheduled.
    late = 0 if host.runner == "v1" else 2
    assert (outcome.drafted, outcome.accepted) == _simulate(model, exit_layer, num_tokens, texts, late=late)
    assert 0 < outcome.accepted < outcome.drafted


def test_drafts_of_some_tokens(host: Host, checkpoints: Path, tmp_path: Path) -> None:
    """Each draft is the best of the listed tokens: as for the truncated model that can say no other."""
    model, listed, file = checkpoint(checkpoints, "llama"), [*range(VOCAB - 1, 3, -3)], tmp_path / "listed.json"
    file.write_text(json.dumps(listed))
    spec = {"method": "del", "del_policy": "fixed", "del_exit_layers": 2, "num_speculative_tokens": 4}
    outcome = host.generate(model, PROMPTS, GREEDY, {**spec, "del_draft_vocab": str(file)}, max_num_batched_tokens=48)
    whole = host.generate(model, PROMPTS, GREEDY, spec, max_num_batched_tokens=48)
    assert outcome.completions == whole.completions
    texts = [(*prompt, *c.token_ids) for prompt, (c,) in zip(PROMPTS, outcome.completions, strict=True)]
    late = 0 if host.runner == "v1" else 2
    assert (outcome.drafted, outcome.accepted) == _simulate(model, 2, 4, texts, late=late, listed=listed)
    assert 0 < outcome.accepted < whole.accepted


def test_drafts_after_preemption(host: Host, checkpoints: Path) -> None:
    """A resumed sequence is drafted for as well as one that was never preempted: its KV is as good."""
    model = checkpoint(checkpoints, "llama")
    spec = {"method": "del", "del_policy": "fixed", "del_exit_layers": 2, "num_speculative_tokens": 4}
    prompts = [[10 + i, *range(30, 60)] for i in range(6)]
    sampling = {**GREEDY, "max_tokens": 100}
    outcome = host.generate(model, prompts, sampling, spec, num_gpu_blocks_override=14)
    assert outcome.preemptions > 0
    texts = [(*prompt, *c.token_ids) for prompt, (c,) in zip(prompts, outcome.completions, strict=True)]
    drafted, accepted = _simulate(model, 2, 4, texts, [len(prompt) for prompt in prompts])
    # A preemption drops a draft, and shifts where later ones begin.
    assert outcome.accepted / outcome.drafted == pytest.approx(accepted / drafted, abs=0.05)


def test_a_batch_of_unfinished_prompts_drafts_nothing(host: Host, checkpoints: Path) -> None:
    """Two chunks of a prompt pass without a draft step; the third ends it and is followed by one, if it is wanted."""
    model = checkpoint(checkpoints, "llama")
    spec = {"method": "del", "del_policy": "fixed", "del_exit_layers": 1, "num_speculative_tokens": 3}
    engine = {"max_num_batched_tokens": 48}
    host.call(_count_steps, model, spec, engine)
    outcome = host.generate(model, [PROMPTS[2]], {**GREEDY, "max_tokens": 2}, spec, **engine)
    assert outcome.steps >= 4
    assert host.call(_counted_steps, model, spec, engine) == 0
    host.call(_count_steps, model, spec, engine)
    host.generate(model, [PROMPTS[2]], {**GREEDY, "max_tokens": 3}, spec, **engine)
    assert host.call(_counted_steps, model, spec, engine) == 1


@pytest.mark.parametrize("wish", [{"enabled": False}, {"max_draft": 2}], ids=str)
def test_no_more_steps_than_requests_want(host: Host, checkpoints: Path, wish: dict[str, Any]) -> None:
    """Where the host knows that no row may draft any more, nothing is launched."""
    model = checkpoint(checkpoints, "llama")
    spec = {"method": "del", "del_policy": "fixed", "del_exit_layers": 1, "num_speculative_tokens": 3}
    engine = {"async_scheduling": False}
    host.call(_count_steps, model, spec, engine)
    outcome = host.generate(model, PROMPTS, {**GREEDY, "extra_args": {"del": wish}}, spec, **engine)
    assert host.call(_counted_steps, model, spec, engine) <= outcome.steps * wish.get("max_draft", 0)
    assert (outcome.accepted > 0) == ("max_draft" in wish)


@pytest.mark.parametrize("host", ["v1"], indirect=True)
def test_rounds_without_drafts_cost_nothing_that_can_be_saved(host: Host, checkpoints: Path) -> None:
    """They are sampled as without speculation, and hardly ever planned; with the same output, seeds included."""
    model = checkpoint(checkpoints, "llama")
    spec = {"method": "del", "del_exit_layers": [1, 3], "num_speculative_tokens": 3}
    host.call(_count_work, model, spec)
    seeded = {**GREEDY, "temperature": 0.8, "top_k": 5, "seed": 3, "extra_args": {"del": {"enabled": False}}}
    outcome = host.generate(model, PROMPTS, seeded, spec)
    work = host.call(_counted_work, model, spec)
    assert (outcome.drafted, work["rejection"]) == (0, 0)
    assert work["rests"] > outcome.steps / 2
    # Not one that might have drafted.
    assert work["might have drafted"] == 0
    assert outcome.completions == host.generate(model, PROMPTS, seeded).completions


@pytest.mark.parametrize("host", ["v1"], indirect=True)
@pytest.mark.parametrize("drafts", [3, 0], ids=["some rows draft", "none drafts"])
def test_a_thinking_budget_ends_its_own_row(host: Host, checkpoints: Path, drafts: int) -> None:
    """Also in steps in which no row has a draft, whose logits lie in another way."""
    model, begin, end, budget = checkpoint(checkpoints, "llama"), 150, 151, 6
    thinking = ReasoningConfig(reasoning_start_str="<think>", reasoning_end_str="</think>")
    thinking._reasoning_start_token_ids = [begin]
    thinking._reasoning_end_token_ids = thinking._natural_reasoning_end_token_ids = [end]
    plain = {**GREEDY, "max_tokens": 12, "extra_args": {"del": {"max_draft": drafts}}}
    each = [plain, {**plain, "thinking_token_budget": budget, "extra_args": {"del": {"enabled": False}}}]
    prompts = [PROMPT, [*PROMPT, begin]]
    spec = {"method": "del", "del_exit_layers": [1, 3], "num_speculative_tokens": 3}
    off, on = (host.generate(model, prompts, each, spec, reasoning_config=thinking) for spec in (None, spec))
    assert on.completions == off.completions
    (others,), (thinks,) = on.completions
    assert end not in others.token_ids
    assert thinks.token_ids.index(end) == budget
    assert bool(on.accepted) == bool(drafts)


def test_nothing_of_its_own_is_in_memory(host: Host, checkpoints: Path) -> None:
    """No weights, and no KV cache: of the same memory there are as many blocks of the same layers as without `del`."""
    model = checkpoint(checkpoints, "llama")
    off, on = (host.call(_memory, model, spec) for spec in (None, {"method": "del"}))
    assert on == off
    assert host.call(_weights_of_its_own, model, {"method": "del"}) == 0


def _count_work(model: str, spec: Any) -> None:
    """In the engine's process: from now on, rounds that rest, and what the rejection sampler does.

    With plans that are as dear as can be, beside which a round is short.
    """
    engine = engines._engine(model, spec, {})
    runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    policy, work = runner.drafter.policy, Counter()
    runner.counted_work = work, policy.pace
    policy.pace = Pace(1e6, policy.planner.costs, learns=False)
    rest, verify = policy.rest, runner.rejection_sampler.forward

    def counted(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            work[name] += result is not False
            return result

        return call

    policy.rest = counted("rests", rest)
    runner.rejection_sampler.forward = counted("rejection", verify)
    policy._tally.add_undrafted = lambda rows: work.update({"might have drafted": rows})


def _counted_work(model: str, spec: Any) -> dict[str, int]:
    engine = engines._engine(model, spec, {})
    runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    policy = runner.drafter.policy
    work, policy.pace = runner.counted_work
    del policy.rest, policy._tally.add_undrafted, runner.rejection_sampler.forward
    return dict(work) | {name: work[name] for name in ("rejection", "might have drafted")}


def _memory(model: str, spec: Any) -> tuple[int, list[list[str]], int]:
    """In the engine's process: blocks of the KV cache, the layers that they are for, and bytes that are allocated."""
    engine = engines._engine(model, spec, {"num_gpu_blocks_override": None})
    runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    groups = [sorted(group.layer_names) for group in runner.kv_cache_config.kv_cache_groups]
    storages = {cache.untyped_storage().data_ptr(): cache.untyped_storage().nbytes() for cache in runner.kv_caches}
    return runner.kv_cache_config.num_blocks, groups, sum(storages.values())


def _weights_of_its_own(model: str, spec: Any) -> int:
    """In the engine's process: parameters of the draft network that are not the target's."""
    engine = engines._engine(model, spec, {"num_gpu_blocks_override": None})
    runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    targets = {id(parameter) for parameter in runner.model.parameters()}
    return sum(id(parameter) not in targets for parameter in drafter_of(engine).model.parameters())


def drafter_of(engine: Any) -> Any:
    runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    return getattr(runner, "drafter", None) or runner.speculator


def _count_steps(model: str, spec: dict[str, Any], options: dict[str, Any]) -> None:
    """In the engine's process: begin to count draft steps, until `_counted_steps`."""
    drafter = drafter_of(engines._engine(model, spec, options))
    drafter.steps_seen, drafter.uncounted = [], (head := drafter.head)

    def counted(hidden_states: torch.Tensor) -> Any:
        drafter.steps_seen.append(1)
        return head(hidden_states)

    drafter.head = counted


def _counted_steps(model: str, spec: dict[str, Any], options: dict[str, Any]) -> int:
    drafter = drafter_of(engines._engine(model, spec, options))
    drafter.head = drafter.uncounted
    return len(drafter.steps_seen)


@torch.inference_mode()
def _simulate(
    path: str,
    exit_layer: int,
    num_tokens: int,
    texts: list[tuple[int, ...]],
    prompt_lengths: Sequence[int] = (),
    late: int = 0,
    listed: Sequence[int] = (),
) -> tuple[int, int]:
    """Tokens drafted and accepted while `texts` are generated after their prompts; a first token needs no draft.
    Drafts are of the `listed` tokens, if any are.

    Drafts are not made past the end of a text, as far as can be known: `late` steps ago so many tokens were there, and
    each step since has brought one at least.
    """
    target = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    early = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    early.model.layers = early.model.layers[:exit_layer]
    early.config.num_hidden_layers = exit_layer
    drafted = accepted = 0
    for text, prompt_length in zip(texts, prompt_lengths or map(len, PROMPTS), strict=True):
        wanted = len(text) - prompt_length
        text = _continued(target, text, num_tokens)  # the last round counts what it accepted past the end
        generated = [0, 1]
        while generated[-1] < wanted:
            steps = min(late, len(generated) - 1)
            number = max(0, min(num_tokens, wanted - (generated[-1 - steps] + steps) - 1))
            known = prompt_length + generated[-1]
            drafts = _continued(early, text[:known], number, listed)[known:]
            pairs = zip(drafts, text[known:], strict=False)
            hits = next((i for i, (draft, token) in enumerate(pairs) if draft != token), number)
            drafted += number
            accepted += hits
            generated.append(generated[-1] + hits + 1)
    return drafted, accepted


def _continued(model: Any, text: tuple[int, ...], num_tokens: int, listed: Sequence[int] = ()) -> tuple[int, ...]:
    """`text` and the `num_tokens` tokens that follow it greedily, of the `listed` ones if any are."""
    for _ in range(num_tokens):
        logits = model(torch.tensor([text]), use_cache=False).logits[0, -1]
        text = (*text, max(listed, key=lambda token: float(logits[token])) if listed else int(logits.argmax()))
    return text
