"""What a verification did, for those that learn from it: from what either model runner says of its step.

The prompt's last positions count where a sequence's prompt has just ended, and it was not preempted: a request that
was begins again with all that it had generated, and keeps what was learnt of it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_del.draft.shadow import PROMPT_POSITIONS
from vllm_del.draft.verified import Verified
from vllm_del.engine.slots import Slots


def on_v1(
    # the V1 runner's own batch, and how many drafts of each row it verified; None or nothing for none
    batch: Any,
    num_drafts: list[int] | None,
    metadata: CommonAttentionMetadata,
    # as they are for this batch
    slots_of: Slots,
    # [rows] int32, [rows] bool
    rejected: torch.Tensor,
    sampled: torch.Tensor,
    # [tokens], after each exit [tokens, hidden size], [rows]
    input_ids: torch.Tensor,
    states: Sequence[torch.Tensor],
    next_token: torch.Tensor,
) -> Verified:
    """A step of the V1 runner, on a CPU."""
    num_rows = len(sampled)
    # [rows]: where each row's tokens end
    ends = metadata.query_start_loc_cpu[1:]
    drafted = torch.tensor(num_drafts) if num_drafts else torch.zeros_like(ends, dtype=torch.int64)
    prompt_len = batch.num_prompt_tokens[:num_rows]
    ended = sampled.numpy() & (batch.num_computed_tokens_cpu[:num_rows] < prompt_len)
    whole_prompt = batch.num_tokens_no_spec[:num_rows] == prompt_len
    fresh, prompts = _fresh(ended, whole_prompt, slots_of.new_rows, metadata.query_start_loc_cpu.diff())
    return Verified(
        states=states,
        input_ids=input_ids,
        start=ends - 1 - drafted,
        drafted=drafted,
        accepted=drafted - rejected,
        next_token=next_token,
        sampled=sampled,
        longest=max(num_drafts, default=0) if num_drafts else 0,
        only_decodes=not ended.any() and bool(sampled.all()),
        num_tokens=int(ends[-1]),
        contexts=int(metadata.seq_lens[:num_rows].sum()),
        came=slots_of.came,
        left=slots_of.left,
        ended=prompts,
        fresh=fresh,
    )


def on_v2(
    batch: InputBatch,
    # how long each request's prompt is, by the runner's own index of requests
    prompt_len: np.ndarray,
    # as they are for this batch
    slots_of: Slots,
    # [rows] int32 each, [rows] bool
    num_sampled: torch.Tensor,
    num_rejected: torch.Tensor,
    sampled: torch.Tensor,
    # after each exit [tokens, hidden size], [rows]
    states: Sequence[torch.Tensor],
    next_token: torch.Tensor,
) -> Verified:
    """A step of the V2 runner, without waiting for its device."""
    num_rows = batch.num_reqs
    # num_rejected counts a row's drafts that were not kept, and num_sampled those that were and one more.
    accepted = (num_sampled - 1).clamp_min(0)
    drafted = torch.where(sampled, accepted + num_rejected, 0)
    computed, prefill_len = batch.num_computed_prefill_tokens_np, batch.prefill_len_np
    ended = (computed < prefill_len) & (computed + batch.num_scheduled_tokens >= prefill_len)
    whole_prompt = prompt_len[batch.idx_mapping_np[:num_rows]] == prefill_len
    fresh, prompts = _fresh(ended, whole_prompt, slots_of.new_rows, batch.num_scheduled_tokens)
    return Verified(
        states=states,
        input_ids=batch.input_ids,
        start=batch.query_start_loc[1 : num_rows + 1].long() - 1 - drafted,
        drafted=drafted,
        accepted=accepted,
        next_token=next_token,
        sampled=sampled,
        longest=int(batch.num_draft_tokens_per_req.max()) if batch.num_draft_tokens_per_req is not None else 0,
        num_tokens=batch.num_tokens,
        contexts=int(batch.seq_lens_cpu_upper_bound[:num_rows].sum()),
        only_decodes=bool((computed >= prefill_len).all()),
        came=slots_of.came,
        left=slots_of.left,
        ended=prompts,
        fresh=fresh,
    )


def _fresh(
    # [rows] bool each: whether a prompt ended, and whether it is all that there is of the request
    ended: np.ndarray,
    whole_prompt: np.ndarray,
    new_rows: list[int],
    # [rows] int, on the host: tokens that the step computed
    tokens: Sequence[int] | np.ndarray | torch.Tensor,
) -> tuple[list[int], list[tuple[int, int]]]:
    """Rows of which nothing is known yet, and of these the ones with a prompt that ended, with how many positions of
    it count: not the last one, after which the target's token is one of the answer."""
    fresh = sorted({*(ended & whole_prompt).nonzero()[0].tolist(), *new_rows})
    return fresh, [(row, min(PROMPT_POSITIONS, int(tokens[row]) - 1)) for row in fresh if ended[row]]
