"""Runs a model in vLLM without drafting, asks every exit what it would have said, and reads what came of it.

Then once more with drafts, where the clock tells what rounds and draft steps take beside what was measured at start.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vllm_del.draft.clock import MOST_ROUNDS
from vllm_del.draft.shadow import IDLE
from vllm_del.policy.acceptance import DECAY
from vllm_del.policy.cost import Correction, MeasuredCosts
from vllm_del.policy.predict import ExitProfile, Profile


def profile(
    model: str,
    prompts: Sequence[str],
    exits: Sequence[int] | None,
    max_tokens: int,
    batch: int,
    max_draft: int,
    # of the head that drafts go through: `del_draft_vocab`, `del_draft_head`; if any, prompts are decoded once more
    head: dict[str, str | int],
    advance: Callable[[int], None],
    engine_args: dict[str, Any],
) -> Profile:
    """Decode `prompts` greedily, up to `max_tokens` tokens each; `advance` is told how many have ended.

    `exits`: the depths to ask, `None` for up to seven that divide the model evenly. Raises what `LLM` raises.
    """
    # Read when vLLM is imported: the engine runs in this process, so that what it learns can be read, and its log is
    # not in the way of what is printed.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    from vllm import LLM, EngineArgs, SamplingParams

    depth = EngineArgs(model=model, **engine_args).create_model_config().get_total_num_hidden_layers()
    asked = sorted(exits) if exits else sorted({max(1, round(depth * part / 8)) for part in range(1, 8)} - {depth})
    config = {
        "method": "del",
        "num_speculative_tokens": max_draft,
        "del_exit_layers": asked,
        **head,
    }
    llm = LLM(model, speculative_config=config, max_num_seqs=batch, **engine_args)

    def decode(drafts: bool = False) -> tuple[int, int, list[list[float]]]:
        """Tokens generated, the contexts they were generated in, and by exit what `_take` gives."""
        llm.collective_rpc(_ask_everything, args=(not drafts,))
        params = SamplingParams(temperature=0, max_tokens=max_tokens, extra_args={"del": {"enabled": drafts}})
        tokens = contexts = 0
        totals = [[0.0] * 4 for _ in asked]
        # What is cached of a prompt is not asked again.
        llm.reset_prefix_cache()
        for start in range(0, len(prompts), batch):
            outputs = llm.generate(list(prompts[start : start + batch]), params, use_tqdm=False)
            for output in outputs:
                generated = len(output.outputs[0].token_ids)
                tokens += generated
                contexts += generated * (len(output.prompt_token_ids or ()) + generated // 2)
            for total, seen in zip(totals, llm.collective_rpc(_take)[0], strict=True):
                total[:] = [a + b for a, b in zip(total, seen, strict=True)]
            advance(len(outputs))
        return tokens, contexts, totals

    # First as a server begins, which has counted nothing yet.
    tokens, contexts, totals = decode()
    by_exit = [_exit_profile(layers, *total) for layers, total in zip(asked, totals, strict=True)]
    if any(llm.collective_rpc(_goes_by_the_clock)):
        decode(drafts=True)
    else:
        advance(len(prompts))
    (costs, *_), (correction, *_) = llm.collective_rpc(costs_of_worker), llm.collective_rpc(_correction)
    correction = replace(correction)  # it goes on being corrected
    if head:
        llm.collective_rpc(_ask_the_whole_head)
        with_all = [_exit_profile(layers, *total) for layers, total in zip(asked, decode()[2], strict=True)]
        by_exit = [replace(a, whole_head=b.agreement) for a, b in zip(by_exit, with_all, strict=True)]
    return Profile(model, depth, max_draft, tokens, contexts // max(1, tokens), by_exit, costs, correction, head)


def _exit_profile(depth: int, matches: float, mismatches: float, right: float, wrong: float) -> ExitProfile:
    def share(part: float, whole: float) -> float:
        return part / whole if whole else float("nan")

    asked = matches + mismatches
    return ExitProfile(depth, int(asked), share(matches, asked), share(right, matches), share(wrong, mismatches))


def _policy(worker: Any) -> Any:
    from vllm_del.engine.patches import drafter_of

    return drafter_of(worker.model_runner).policy


def _ask_everything(worker: Any, everything: bool) -> None:
    """In the worker: nothing fades, every round counts, and as much may go into asking exits as into the model itself;
    or all as in service."""
    policy, budget = _policy(worker), worker.vllm_config.speculative_config.del_shadow_budget
    # Rounds without drafts have a part of the budget only.
    policy.statistics.decay, policy.shadow.share = (1.0, 1.0 / IDLE) if everything else (DECAY, budget)
    policy.pace.most = 1 if everything else MOST_ROUNDS
    policy.asker.ask_all(everything)
    # What rounds took that ask everything is no word for those that do not.
    policy.stopwatch.forget()


def _goes_by_the_clock(worker: Any) -> bool:
    """In the worker: whether its clock corrects the costs."""
    return _policy(worker).stopwatch.learns


def _ask_the_whole_head(worker: Any) -> None:
    """In the worker: from now on exits say what they would through all of the target's head."""
    shadow = _policy(worker).shadow
    shadow.head = shadow.whole_head


def _take(worker: Any) -> list[list[float]]:
    """In the worker: by exit, matches and mismatches since last time, and the sums of confidence of either."""
    counts, sums = _policy(worker).statistics.take_totals()
    return [[*of_counts, *of_sums] for of_counts, of_sums in zip(counts.tolist(), sums.tolist(), strict=True)]


def costs_of_worker(worker: Any) -> MeasuredCosts:
    """In the worker, of a dynamic policy that goes by goodput: what it goes by."""
    return _policy(worker).planner.costs.measured


def _correction(worker: Any) -> Correction:
    """In the worker: what its clock said of these costs in the last rounds, where one corrects them."""
    return _policy(worker).planner.costs.correction
