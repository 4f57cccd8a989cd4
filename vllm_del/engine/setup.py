"""What both runners build from the configuration and the loaded target."""

from typing import Protocol

import torch
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.utils import get_model_cls
from vllm.model_executor.models.interfaces import supports_eagle3

from vllm_del.config import DelConfig
from vllm_del.draft.clock import Pace, Stopwatch
from vllm_del.draft.decide import DynamicPolicy, FixedPolicy
from vllm_del.draft.head import Head
from vllm_del.draft.network import EarlyExitNetwork
from vllm_del.draft.shadow import ShadowScorer
from vllm_del.engine.measure import costs_of, planning_seconds
from vllm_del.engine.rehearsal import Performer, Rehearsal
from vllm_del.engine.slots import Slots
from vllm_del.policy.cost import CostTables
from vllm_del.policy.planner import Planner


def check_target(vllm_config: VllmConfig) -> None:
    """Raise `ValueError` if the target's class does not hand out what the policy needs."""
    config, target = vllm_config.speculative_config, get_model_cls(vllm_config.model_config)
    assert isinstance(config, DelConfig)
    if config.is_dynamic and not supports_eagle3(target):
        raise ValueError(
            f"{target.__name__} does not hand out hidden states of early layers (vLLM's SupportsEagle3), by "
            "which del_policy='dynamic' learns: set del_policy='fixed', and measure whether it pays"
        )


class Drafter(Performer, Protocol):
    """What both runners' drafters have when a model is loaded and its KV cache is there."""

    model: EarlyExitNetwork
    whole_head: Head
    """The target's own, where drafts may go through less of it."""
    slots_of: Slots


def make_policy(drafter: Drafter) -> FixedPolicy | DynamicPolicy:
    """The policy that is asked for, when all else is ready to serve: it may have to measure what a round costs."""
    vllm_config, network, device = drafter.vllm_config, drafter.model, drafter.device
    config = vllm_config.speculative_config
    assert isinstance(config, DelConfig)
    length = config.num_speculative_tokens
    if not config.is_dynamic:
        return FixedPolicy(length)
    on_host = not vllm_config.use_v2_model_runner
    # Where the host sees what the device does; and ranks that go by clocks of their own would plan differently, and
    # wait for each other for ever.
    by_clock = on_host and vllm_config.parallel_config.tensor_parallel_size == 1
    max_rows, goodput = vllm_config.scheduler_config.max_num_seqs, config.del_objective == "goodput"
    measured = costs_of(vllm_config, Rehearsal(drafter), config.exits) if goodput else None
    heads = drafter.head, drafter.whole_head

    def build() -> DynamicPolicy:
        costs = CostTables(measured, max_rows, length, device) if measured else None
        shadow = ShadowScorer(network.read_out, *heads, costs, config.del_shadow_budget, device, by_clock)
        planner = Planner(torch.tensor(config.exits, device=device), costs, length) if costs else None
        stopwatch = Stopwatch(costs, config.exits, by_clock) if costs else None
        exits, layers, slots = config.exits, network.num_layers, drafter.slots_of.number
        return DynamicPolicy(exits, layers, length, slots, shadow, planner, device, on_host, stopwatch)

    policy = build()
    if policy.planner is not None:
        # With another one, as it learns from what it is timed with.
        seconds = planning_seconds(build(), min(8, max_rows), device)
        policy.pace = Pace(seconds, policy.planner.costs, by_clock)
    return policy
