"""Draft heads: what a whole vocabulary says, shards of it on several ranks, a part of it, and a copy in FP8."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from vllm_del.draft import head as head_module
from vllm_del.draft.head import (
    FusedHead,
    Head,
    LogitsHead,
    PlainHead,
    RenamedHead,
    most_probable,
    most_probable_on_cpu,
    quantise,
)

STATES = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(90, 16, generator=torch.Generator().manual_seed(1))
PLAIN = PlainHead(WEIGHT, 0, soft_cap=20.0, logit_scale=0.7)
LISTED = torch.tensor([2, 3, 17, 40, 41, 77, 89])


def logits(states: torch.Tensor) -> torch.Tensor:
    return 0.7 * 20 * torch.tanh(states @ WEIGHT.T / 20)


def check_same(head: Head, expected: Head) -> None:
    for given, wanted in zip(head(STATES), expected(STATES), strict=True):
        torch.testing.assert_close(given, wanted)


def listed_logits(states: torch.Tensor) -> torch.Tensor:
    """Of the listed tokens; no other one can be chosen, nor has a part of the sum."""
    others = torch.ones(len(WEIGHT), dtype=torch.bool).index_fill(0, LISTED, False)
    return logits(states).masked_fill(others, -torch.inf)


def test_says_what_the_logits_say() -> None:
    check_same(FusedHead(PLAIN), LogitsHead(logits))
    check_same(LogitsHead(lambda states: PLAIN.finish(states @ WEIGHT.T)), LogitsHead(logits))


@pytest.mark.parametrize("read", [most_probable, most_probable_on_cpu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_the_most_probable_token(
    rows: int, dtype: torch.dtype, read: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """The first of equals, as torch has it, and NaN above all; of a vocabulary that is padded."""
    given = (4 * torch.randn(rows, 1000, generator=torch.Generator().manual_seed(rows))).to(dtype)
    largest = given.amax(1)
    given[:, 600] = given[:, 400] = largest
    given[:1, 0] = -torch.inf
    given[:, 990:] = torch.inf
    given = given[:, :990]
    token, probability = read(given)
    assert (token.dtype, probability.dtype) == (torch.int64, torch.float32)
    assert token.tolist() == [row.index(max(row)) for row in given.tolist()]
    assert (token <= 400).all()
    torch.testing.assert_close(probability, given.float().softmax(1).gather(1, token.unsqueeze(1)).squeeze(1))
    given[:1, 70:90] = torch.nan
    token, probability = read(given)
    assert token[:1].tolist() == [70] * (rows > 0)
    assert probability.isnan().tolist() == [number == 0 for number in range(rows)]


def test_ranks_with_shards_of_the_vocabulary() -> None:
    """Every rank says what one with the whole vocabulary says, from one message of each."""
    shards = [
        replace(PLAIN, weight=WEIGHT[begin:end], first_token=begin) for begin, end in ((0, 40), (40, 70), (70, 90))
    ]
    sent: list[torch.Tensor] = []

    def send(packed: torch.Tensor, dim: int) -> torch.Tensor:
        sent.append(packed)
        return packed

    for shard in shards:
        FusedHead(replace(shard, all_gather=send))(STATES)
    for shard in shards:
        check_same(FusedHead(replace(shard, all_gather=lambda _, dim: torch.cat(sent, dim))), FusedHead(PLAIN))


def test_a_part_of_the_vocabulary() -> None:
    assert not torch.equal(LogitsHead(listed_logits)(STATES)[0], LogitsHead(logits)(STATES)[0])
    check_same(FusedHead(PLAIN, shortlist=LISTED), LogitsHead(listed_logits))
    copies = FusedHead(replace(PLAIN, weight=WEIGHT[LISTED]))
    check_same(RenamedHead(copies, LISTED), LogitsHead(listed_logits))


@pytest.mark.parametrize("tokens", [None, LISTED])
def test_a_copy_in_fp8(monkeypatch: pytest.MonkeyPatch, tokens: torch.Tensor | None) -> None:
    """Rows of any size keep three bits and a half; one of zeros stays so."""
    monkeypatch.setattr(head_module, "AT_ONCE", 4)
    weight = (WEIGHT * torch.logspace(-6, 6, len(WEIGHT)).unsqueeze(1)).index_fill(0, torch.tensor([17]), 0.0)
    expected = weight if tokens is None else weight[tokens]
    rows = torch.empty(expected.shape, dtype=torch.float8_e4m3fn)
    scales = torch.full((len(expected),), torch.nan)
    quantise(weight, tokens, rows, scales)
    dequantised = rows.float() * scales.unsqueeze(1)
    assert ((dequantised - expected).abs() <= expected.abs() / 16 + expected.abs().amax(1, keepdim=True) / 1e4).all()
    assert not torch.equal(dequantised, expected)
    check_same(FusedHead(replace(PLAIN, weight=rows), row_scales=scales), FusedHead(replace(PLAIN, weight=dequantised)))


def test_what_the_log_says_of_it() -> None:
    in_fp8 = FusedHead(PLAIN, row_scales=torch.ones(90))
    assert str(LogitsHead(logits)) == "LM head"
    assert str(FusedHead(PLAIN)) == "fused LM head"
    assert str(FusedHead(PLAIN, shortlist=LISTED)) == "fused LM head over 7 tokens"
    assert str(RenamedHead(in_fp8, LISTED)) == "fused LM head in FP8 over 7 tokens"
