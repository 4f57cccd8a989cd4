"""The ledger's second part: faults of vLLM 0.32 that `del` meets, mended in a process whose runner serves it.

Each is one small function that gets the original first; `patches` says where they go.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CUDAGraphMode

from vllm_del.config import DelConfig

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata


def keep_to_the_graph(
    original: Callable,
    self: Any,
    scheduler_output: Any,
    batch_req_state: Any,
    batch_desc: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """V2: attention's metadata are made for rows as long as those that a graph was recorded for.

    Why: vLLM 0.32 makes them for the longest row of the batch, but for its adaptive verification. FlashAttention 3 lays
    them out in another way where no row has more than one token (heads of up to 64 or more than 128), as in rounds
    without drafts, and a graph that was recorded for longer rows would read something else from them. Goes when vLLM
    takes the bound from the graph's descriptor.
    """
    batch = original(self, scheduler_output, batch_req_state, batch_desc, *args, **kwargs)
    if batch_desc.cg_mode == CUDAGraphMode.FULL and batch_desc.max_query_len is not None:
        batch.max_query_len = batch_desc.max_query_len
    return batch


def sample_as_without_drafts(
    original: Callable, self: Any, scheduler_output: "SchedulerOutput", *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, "SpecDecodeMetadata | None", int]:
    """V1: a step in which no sequence has a draft is sampled as in vLLM without speculation.

    Why: vLLM 0.32 has the rejection sampler do it with any speculative method, which takes longer, and dies on `top_k`
    where there is no drafted position. Goes when vLLM makes metadata of drafts only where there are some. Then it also
    has to tell a thinking budget whose rows the logits are: one for each sequence, or for each of its drafts.
    """
    logits_indices, of_drafts, most_sampled = original(self, scheduler_output, *args, **kwargs)
    if not isinstance(self.speculative_config, DelConfig):
        return logits_indices, of_drafts, most_sampled
    any_drafts = bool(scheduler_output.scheduled_spec_decode_tokens)
    if (thinking := self.input_batch.thinking_budget_state_holder) is not None:
        thinking.in_spec_mode = any_drafts
    return logits_indices, of_drafts if any_drafts else None, most_sampled


def expand_for_any_dtype(
    _original: Callable,
    # [batch_size]
    x: torch.Tensor,
    # [batch_size]
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """V1 on a CPU: temperature, `top_k` and `top_p` of each sequence, repeated for its drafts [num_tokens].

    Why: vLLM 0.32's CPU version fills an int64 copy of its output and drops it unless the output is int64 itself,
    which these never are; what is then read as temperature is whatever the memory held, so sampled output
    would not follow the target's distribution. Goes with vllm-project/vllm#42638 or its like.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts, output_size=num_tokens)
