"""The fused head: what a whole vocabulary says, and shards of it on several ranks."""

import torch

from vllm_del.draft.head import FusedHead, LogitsHead

STATES = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(90, 16, generator=torch.Generator().manual_seed(1))


def test_says_what_the_logits_say() -> None:
    token, probability = FusedHead(WEIGHT, 0, soft_cap=20.0, logit_scale=0.7)(STATES)
    expected, expected_probability = LogitsHead(lambda states: 0.7 * 20 * torch.tanh(states @ WEIGHT.T / 20))(STATES)
    assert torch.equal(token, expected)
    torch.testing.assert_close(probability, expected_probability)


def test_ranks_with_shards_of_the_vocabulary() -> None:
    """Every rank says what one with the whole vocabulary says, from one message of each."""
    bounds = [(0, 40), (40, 70), (70, 90)]
    sent: list[torch.Tensor] = []

    def send(packed: torch.Tensor, dim: int) -> torch.Tensor:
        sent.append(packed)
        return packed

    for begin, end in bounds:
        FusedHead(WEIGHT[begin:end], begin, None, 1.0, send)(STATES)
    whole = FusedHead(WEIGHT, 0, None, 1.0)(STATES)
    for begin, end in bounds:
        said = FusedHead(WEIGHT[begin:end], begin, None, 1.0, lambda _packed, dim: torch.cat(sent, dim))(STATES)
        assert torch.equal(said[0], whole[0])
        torch.testing.assert_close(said[1], whole[1])
