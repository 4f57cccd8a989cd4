"""What a choice of exit and draft length is worth, from acceptance rates: closed forms, and the best choice under each.

An acceptance rate is the probability that a draft is accepted, given that those before it were. A round that drafts d
tokens at rate a yields the accepted ones and one of the verification's own: 1 + a + a^2 + ... + a^d in the mean.
"""

import torch


def expected_tokens(
    # [...] float
    acceptance: torch.Tensor,
    max_length: int,
) -> torch.Tensor:
    """Tokens a round yields in the mean, for each draft length from 0 to `max_length`: [..., max_length + 1].

    The sum itself, not (1 - a^(d+1)) / (1 - a), which has no value at a = 1 and few digits near it.
    """
    powers = torch.arange(max_length + 1, device=acceptance.device)
    return acceptance.unsqueeze(-1).pow(powers).cumsum(-1)


def tokens_per_layer(
    # [..., exits] float; NaN where nothing is known
    acceptance: torch.Tensor,
    # [exits] int
    depths: torch.Tensor,
    num_layers: int,
    max_length: int,
) -> torch.Tensor:
    """TPL(E, d) = expected tokens / (d E + L): [..., exits, max_length + 1] (DEL, arXiv 2504.05598).

    A draft token loads E layers, the verification all L of them. The head, the context and the batch cost nothing here.
    """
    layers = depths.unsqueeze(-1) * torch.arange(max_length + 1, device=depths.device) + num_layers
    return expected_tokens(acceptance, max_length) / layers


def best_by_tokens_per_layer(
    # [..., exits] float; NaN where nothing is known
    acceptance: torch.Tensor,
    # [exits] int, ascending
    depths: torch.Tensor,
    num_layers: int,
    max_length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The exit (an index into `depths`) and the draft length of the highest TPL, both [...] int64.

    Of equals the shallowest exit wins, then the shortest length; an exit of which nothing is known never does, unless
    nothing is known of any.
    """
    values = tokens_per_layer(acceptance, depths, num_layers, max_length).nan_to_num(-torch.inf).flatten(-2)
    choice = _first_of_the_largest(values)
    return choice // (max_length + 1), choice % (max_length + 1)


def _first_of_the_largest(
    # [..., n] float
    values: torch.Tensor,
) -> torch.Tensor:
    """As `argmax`, which does not promise the first of equals on every device: [...] int64."""
    count = values.shape[-1]
    places = torch.arange(count, device=values.device)
    return torch.where(values == values.amax(-1, keepdim=True), places, count).amin(-1)
