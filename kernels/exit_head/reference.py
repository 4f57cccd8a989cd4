"""`exit_head` in plain torch."""

from typing import NamedTuple

import torch


class HeadTokens(NamedTuple):
    """What the head says of each row, [rows] each; with more dimensions in front, of each part of the vocabulary."""

    # int64: the token of the largest score, the first of equals
    token: torch.Tensor
    # float32: its logit, with its noise if there is any
    score: torch.Tensor
    # float32: its logit
    logit: torch.Tensor
    # float32: the logarithm of the sum of the exponentials of all logits
    log_sum: torch.Tensor

    @property
    def probability(self) -> torch.Tensor:
        """Of the token, under the softmax of the logits, [rows] float32."""
        return torch.exp(self.logit - self.log_sum)


def exit_head(
    # [rows, hidden size] bfloat16, float16 or float32: the norm's input, or what it gives if there is no `norm_weight`
    states: torch.Tensor,
    # [vocabulary, hidden size], the type of `states`, or float8_e4m3fn (on GPUs that have it): the LM head or a shard
    weight: torch.Tensor,
    *,
    # [hidden size]: of the RMS norm before the head
    norm_weight: torch.Tensor | None = None,
    epsilon: float = 1e-6,
    # as vLLM's LogitsProcessor has them: first the soft-cap, then the scale
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    # [vocabulary] float32: what each row of `weight` is to be multiplied by
    row_scales: torch.Tensor | None = None,
    # [kept] int64, ascending: the rows of `weight` that take part; all if None
    shortlist: torch.Tensor | None = None,
    # the token of the first row of `weight`
    first_token: int = 0,
    # [rows] float32: what logits are divided by; and [rows] int64: seeds of the noise. Rows of temperature 0 are greedy
    temperature: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
) -> HeadTokens:
    """RMS norm, LM head, and of its logits the largest one and the sum of exponentials.

    With `temperature` and `seeds` the token is a sample of the softmax: Gumbel noise is added to the logits (the
    Gumbel-max trick), a function of the seed and the token, so that shards of a vocabulary draw apart. NaN counts as
    larger than anything, as torch has it.

    Products are accumulated in float32.
    """
    if norm_weight is not None:
        wide = states.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * norm_weight.float()
        states = wide.to(states.dtype)
    kept = torch.arange(len(weight), device=weight.device) if shortlist is None else shortlist
    rows_of_head = weight if shortlist is None else weight[shortlist]
    logits = states.float() @ rows_of_head.float().T
    if row_scales is not None:
        logits = logits * row_scales[kept]
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    logits = logits * logit_scale
    tokens, scores = kept + first_token, logits
    if seeds is not None:
        assert temperature is not None
        greedy = (temperature == 0).unsqueeze(1)
        logits = logits / temperature.unsqueeze(1).masked_fill(greedy, 1)
        scores = torch.where(greedy, logits, logits + gumbel(seeds.unsqueeze(1), tokens.unsqueeze(0)))
    score, place = scores.max(-1, keepdim=True)
    return HeadTokens(
        tokens[place.squeeze(1)], score.squeeze(1), logits.gather(1, place).squeeze(1), logits.logsumexp(-1)
    )


def merge(
    # [parts, rows] each: of parts of the vocabulary, in the order of their tokens
    parts: HeadTokens,
) -> HeadTokens:
    """What the head says of each row, [rows] each, from what it said in each part of the vocabulary."""
    score, best = parts.score.max(0, keepdim=True)
    token, logit = parts.token.gather(0, best).squeeze(0), parts.logit.gather(0, best).squeeze(0)
    return HeadTokens(token, score.squeeze(0), logit, parts.log_sum.logsumexp(0))


def gumbel(
    # int64, of shapes that broadcast
    seeds: torch.Tensor,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """Standard Gumbel noise, float32: minus the logarithm of an exponential variate, -log(1 - u).

    `u` are the uniform numbers of `triton.language.rand(seed, token)`. The largest noise comes of the smallest `u`,
    where float32 is fine: near 1 it is coarse, and in a large vocabulary the best tokens would tie.
    """
    u = _uniform(seeds, tokens).clamp_min(SMALLEST)
    return -torch.log(torch.where(u < SMALL, u * (1 + u * (0.5 + u / 3)), -torch.log(1 - u)))


SMALLEST = 2.0**-32
"""In place of a uniform number of 0, whose noise would be infinite."""

SMALL = 2.0**-7
"""Below it, a series for -log(1 - u): 1 - u would be rounded."""

_WORD = 0xFFFFFFFF


def _uniform(seeds: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Philox 4x32 with 10 rounds (Salmon et al., SC 2011), one word of it as a float32 in [0, 1)."""
    seeds, tokens = torch.broadcast_tensors(seeds, tokens)
    # 32-bit words in int64
    key = seeds & _WORD, (seeds >> 32) & _WORD
    a, b, c, d = tokens & _WORD, (tokens >> 32) & _WORD, torch.zeros_like(tokens), torch.zeros_like(tokens)
    for _ in range(10):
        # The products of two words wrap around in int64, and have the right bits all the same.
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = ((second >> 32) & _WORD) ^ b ^ key[0], second & _WORD
        c, d = ((first >> 32) & _WORD) ^ d ^ key[1], first & _WORD
        key = (key[0] + 0x9E3779B9) & _WORD, (key[1] + 0xBB67AE85) & _WORD
    signed = torch.where(a < 2**31, a, a - 2**32)
    return torch.where(signed < 0, -signed - 1, signed).float() * 4.6566127342e-10
