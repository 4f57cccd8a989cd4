"""What the policy expected of a workload, beside what came of it; and the most that could be expected."""

from statistics import median
from typing import Any

import torch
from workloads import PROMPT_TOKENS

from vllm_del.draft.tally import Counts
from vllm_del.policy.cost import Correction, CostTables, MeasuredCosts
from vllm_del.policy.predict import predict

ENOUGH = 200
"""Drafts whose fate is known, to take the acceptance rate of an exit from."""


def estimates(counts: list[Counts]) -> dict[str, Any]:
    """What the policy expected beside what came: of drafts that were tried, and of the time of rounds."""
    tried = sum(sum(of.tried) for of in counts)
    timed = [of for of in counts if of.measured_seconds]
    found: dict[str, Any] = {"drafted_by_exit": [sum(by) for by in zip(*(of.drafted for of in counts), strict=True)]}
    if tried:
        found["acceptance_expected"] = round(sum(sum(of.expected) for of in counts) / tried, 3)
        found["acceptance"] = round(sum(sum(of.accepted) for of in counts) / tried, 3)
    if timed:
        found["round_time_planned_over_measured"] = round(
            median(of.planned_seconds / of.measured_seconds for of in timed), 3
        )
    return found


def allowed(
    costs: MeasuredCosts,
    correction: Correction,
    counts: list[Counts],
    workload: str,
    about: dict[str, Any],
    exits: list[int],
    longest: int,
    tokens: int,
) -> dict[str, Any]:
    """The speed-up that measured costs and the acceptance of drafts allow, the acceptance by exit, and what these costs
    say of the tokens a second without drafts: where that is not what was measured, the rest is worth little.

    Costs are as measured at start, corrected by the clock of the last rounds in which all places were taken; of
    sequences that are alike, with the prompts that all of them have to compute. For exits that hardly drafted, the
    agreement that the model was made with.
    """
    kind, number = workload.split(" x")
    agreement = about.get("agreement_by_exit", {}).get(kind)
    if agreement is None or any(str(depth) not in agreement for depth in exits):
        return {"allowed": None}
    rates = [agreement[str(depth)] for depth in exits]
    for index in range(len(exits)):
        tried, accepted = (sum(getattr(of, name)[index] for of in counts) for name in ("tried", "accepted"))
        if tried >= ENOUGH:
            rates[index] = accepted / tried
    places = int(number)
    best = predict(costs, exits, rates, longest, places, PROMPT_TOKENS + tokens // 2, correction)
    tables = CostTables(costs, places + PROMPT_TOKENS, longest, torch.device("cpu"))
    of_prompt = correction.verify * (tables.verify_seconds(places + PROMPT_TOKENS) - tables.verify_seconds(places))
    without, with_drafts = (of_prompt + tokens / rate for rate in (best.without, best.best))
    return {
        "allowed": round(without / with_drafts, 3),
        "allowed_at": {depth: round(rate, 3) for depth, rate in zip(exits, rates, strict=True)},
        "off_by_costs": round(tokens / without, 1),
    }
