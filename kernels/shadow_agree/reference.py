"""`shadow_agree` in plain torch."""

from typing import Any

import torch
from vllm_del.kernels.exit_head.reference import exit_head


def shadow_agree(
    # [pairs, hidden size] bfloat16, float16 or float32: what the LM head reads of each pair of position and exit
    states: torch.Tensor,
    # [vocabulary, hidden size]: the LM head
    weight: torch.Tensor,
    # [pairs] int64: what the target said there
    expected: torch.Tensor,
    # as of `exit_head`: norm, soft-cap, scales, shortlist
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether the most probable token is the expected one, [pairs] bool, and its own probability, [pairs] float32.

    The probability is the confidence of DEL's statistics (arXiv 2504.05598, section 3): of what the exit says, whether
    it agrees or not.
    """
    said = exit_head(states, weight, **options)
    return said.token == expected, said.probability
