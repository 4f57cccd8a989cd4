"""What a verification did: what drafters learn from."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass
class Verified:
    """Tensors on the model's device, by row of the batch."""

    # per candidate exit, and at last for the whole model: [tokens, hidden size], hidden state and residual together
    states: Sequence[torch.Tensor]
    # [tokens] int: what was fed
    input_ids: torch.Tensor
    # [rows] int64: where in these the row's last known token is; its drafts follow
    start: torch.Tensor
    # [rows] int64: the drafts verified, and of these the accepted
    drafted: torch.Tensor
    accepted: torch.Tensor
    # [rows] int: the token that the target chose itself, after the accepted drafts
    next_token: torch.Tensor
    # [rows] bool: rows past their prompt; the others sampled nothing that counts
    sampled: torch.Tensor
    # the largest of `drafted`, or a bound on it
    longest: int
    # of the step, prompts included
    num_tokens: int
    # the context lengths of all rows together, or a bound on it
    contexts: int
    # whether every row was past its prompt before
    only_decodes: bool
    # how many sequences were not in the batch before, new ones or not, and how many of that one are not in this
    came: int
    left: int
    # rows of sequences seen for the first time, or again in another slot
    fresh: Sequence[int]
    # of these the rows that ended their prompt in this step, and how many of its positions before the last one count
    ended: Sequence[tuple[int, int]]
