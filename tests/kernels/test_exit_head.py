"""`exit_head`: the kernel against the reference, and the reference against what torch says."""

from typing import Any

import pytest
import torch
from vllm_del.kernels.exit_head import HeadTokens, merge, reference

from tests.kernels.conftest import OnTriton

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole_numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Few values, so that many logits are equal and all sums are exact."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def both(device: str, states: torch.Tensor, weight: torch.Tensor, **options: Any) -> tuple[HeadTokens, HeadTokens]:
    """What the kernel says, with memory that was not written left as NaN, and what the reference says."""
    from vllm_del.kernels.exit_head import triton

    expected = reference.exit_head(states, weight, **options)
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    torch.use_deterministic_algorithms(True)  # fills what `empty` gives with NaN
    try:
        given = triton.exit_head(states.to(device), weight.to(device), **moved)
    finally:
        torch.use_deterministic_algorithms(False)
    return HeadTokens(*(value.cpu() for value in given)), expected


def check_equal(device: str, states: torch.Tensor, weight: torch.Tensor, options: dict[str, Any]) -> HeadTokens:
    """The same tokens, and the same numbers up to the order of sums."""
    given, expected = both(device, states, weight, **options)
    torch.testing.assert_close(given.token, expected.token)
    for name in ("score", "logit", "log_sum"):
        torch.testing.assert_close(getattr(given, name), getattr(expected, name), equal_nan=True, rtol=1e-5, atol=1e-5)
    return given


def check_close(device: str, states: torch.Tensor, weight: torch.Tensor, options: dict[str, Any]) -> None:
    """The same but for rounding, which may choose another of two tokens that are nearly equal."""
    given, expected = both(device, states, weight, **options)
    tolerance = {"rtol": TOLERANCE[states.dtype], "atol": TOLERANCE[states.dtype]}
    torch.testing.assert_close(given.score, expected.score, **tolerance)
    torch.testing.assert_close(given.log_sum, expected.log_sum, **tolerance)
    # What the reference says of the token that was chosen: of no more than this one
    of_token = [reference.exit_head(states[i : i + 1], weight[t : t + 1], **options) for i, t in enumerate(given.token)]
    torch.testing.assert_close(torch.cat([of.score for of in of_token]), expected.score, **tolerance)


SIZES = [(1, 1, 1), (1, 64, 128), (3, 65, 129), (5, 777, 37), (16, 200, 64), (17, 130, 40), (70, 100, 24)]


@pytest.mark.parametrize(("rows", "vocabulary", "hidden"), SIZES)
@pytest.mark.parametrize("norm", [False, True])
def test_float32(on_triton: OnTriton, rows: int, vocabulary: int, hidden: int, norm: bool) -> None:
    options = {"norm_weight": numbers(hidden, seed=2)} if norm else {}
    on_triton(check_equal, numbers(rows, hidden), numbers(vocabulary, hidden, seed=1), options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [False, True])
def test_half_precision(on_triton: OnTriton, dtype: torch.dtype, norm: bool) -> None:
    options = {"norm_weight": numbers(72, seed=2, dtype=dtype)} if norm else {}
    on_triton(check_close, numbers(9, 72, dtype=dtype), numbers(333, 72, seed=1, dtype=dtype), options)


def check_in_every_shape(device: str, rows: int) -> None:
    from vllm_del.kernels.exit_head import triton

    kept = triton.SHAPES[:], triton._read_part_tuned.configs
    assert len(kept[0]) > 1
    try:
        for shape in kept[0]:
            triton.SHAPES[:] = triton._read_part_tuned.configs = [shape]
            check_equal(device, numbers(rows, 72), numbers(333, 72, seed=1), {})
    finally:
        triton.SHAPES[:], triton._read_part_tuned.configs = kept


@pytest.mark.parametrize("rows", [9, 100])
def test_every_shape_of_block(on_triton: OnTriton, rows: int) -> None:
    """Whichever is measured to be best on a GPU."""
    on_triton(check_in_every_shape, rows)


def test_no_rows(on_triton: OnTriton) -> None:
    on_triton(check_equal, numbers(0, 16), numbers(70, 16), {})


@pytest.mark.parametrize("seed", range(4))
def test_the_first_of_equals(on_triton: OnTriton, seed: int) -> None:
    given = on_triton(check_equal, whole_numbers(6, 4), whole_numbers(400, 4, seed=seed), {})
    logits = whole_numbers(6, 4) @ whole_numbers(400, 4, seed=seed).T
    # There have to be equals for this to say anything.
    assert ((logits == logits.amax(1, keepdim=True)).sum(1) > 1).any()
    assert given.token.tolist() == [int((row == row.max()).nonzero()[0]) for row in logits]


@pytest.mark.parametrize("at", [0, 63, 64, 399])
def test_nan_is_the_largest(on_triton: OnTriton, at: int) -> None:
    weight = numbers(400, 8, seed=1)
    weight[at, 3] = torch.nan
    weight[399, 2] = torch.nan
    given = on_triton(check_equal, numbers(3, 8), weight, {})
    assert given.token.tolist() == [at] * 3
    assert given.probability.isnan().all()


def test_rows_of_nan_and_infinities(on_triton: OnTriton) -> None:
    """A broken row says something, within the vocabulary, and its neighbours say what they would have said."""
    states, weight = numbers(5, 8).abs(), numbers(200, 8, seed=1)
    states[1] = torch.nan
    weight[:, 0] = -torch.inf
    weight[77, 0] = 1.0
    given = on_triton(check_equal, states, weight, {})
    assert given.token.tolist() == [77, 0, 77, 77, 77]
    weight[77, 0] = -torch.inf
    given = on_triton(check_equal, states, weight, {})
    assert given.token.tolist() == [0] * 5
    weight[150, 0] = torch.inf
    given = on_triton(check_equal, states, weight, {})
    assert given.token.tolist() == [150, 0, 150, 150, 150]


def test_soft_cap_and_scale(on_triton: OnTriton) -> None:
    states, weight = 6 * numbers(4, 16), numbers(300, 16, seed=1)
    plain = on_triton(check_equal, states, weight, {})
    capped = on_triton(check_equal, states, weight, {"soft_cap": 30.0, "logit_scale": 0.5})
    assert (plain.score > 40).any()
    assert (capped.score <= 15).all()


def test_shortlist_and_first_token(on_triton: OnTriton) -> None:
    shortlist = torch.randperm(500, generator=torch.Generator().manual_seed(3))[:131].sort().values
    states, weight = numbers(4, 16), numbers(500, 16, seed=1)
    given = on_triton(check_equal, states, weight, {"shortlist": shortlist, "first_token": 1000})
    assert set(given.token.tolist()) <= set((shortlist + 1000).tolist())
    assert given.token.tolist() == (1000 + shortlist[(states @ weight[shortlist].T).argmax(1)]).tolist()


@pytest.mark.parametrize("short", [False, True])
def test_fp8_head(on_triton: OnTriton, short: bool) -> None:
    weight = numbers(300, 48, seed=1)
    scales = weight.abs().amax(1) / torch.finfo(torch.float8_e4m3fn).max
    rounded = (weight / scales.unsqueeze(1)).to(torch.float8_e4m3fn)
    options = {"row_scales": scales} | ({"shortlist": torch.arange(5, 300, 3)} if short else {})
    given = on_triton(check_equal, numbers(6, 48), rounded, options)
    exact = reference.exit_head(numbers(6, 48), weight, shortlist=options.get("shortlist"))
    torch.testing.assert_close(given.score, exact.score, rtol=0.05, atol=0.3)


def test_noise_is_the_same_in_both(on_triton: OnTriton) -> None:
    heat, seeds = torch.tensor([0.0, 0.5, 1.0, 2.0, 1.0]), torch.tensor([7, 2**40 + 3, -5, 0, 2**63 - 1])
    options = {"temperature": heat, "seeds": seeds}
    states, weight = numbers(5, 16), 0.3 * numbers(400, 16, seed=1)
    given = on_triton(check_equal, states, weight, options)
    logits = states @ weight.T
    assert given.token[0] == logits[0].argmax()
    assert given.score[0] == given.logit[0]
    assert (given.token[1:] != logits.argmax(1)[1:]).any()


def test_noise_samples_the_softmax() -> None:
    """20,000 draws of eight tokens: each as often as its probability says, by a chi-square test."""
    draws, logits = 20_000, torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 1.5, -2.0, 0.2])
    states = torch.ones(draws, 1)
    heat = torch.full((draws,), 0.8)
    drawn = reference.exit_head(states, logits.unsqueeze(1), temperature=heat, seeds=torch.arange(draws))
    expected = draws * torch.softmax(logits / 0.8, 0)
    counts = torch.bincount(drawn.token, minlength=8)
    assert ((counts - expected).square() / expected).sum() < 24.3  # 7 degrees of freedom, 1 in 1000
    torch.testing.assert_close(drawn.probability, torch.softmax(logits / 0.8, 0)[drawn.token])


def check_like_triton(device: str, seeds: torch.Tensor, tokens: torch.Tensor) -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def uniform(seeds, tokens, out, COUNT: tl.constexpr):
        at = tl.arange(0, COUNT)
        tl.store(out + at, tl.rand(tl.load(seeds + at), tl.load(tokens + at)))

    out = torch.empty(len(seeds), device=device)
    uniform[(1,)](seeds.to(device), tokens.to(device), out, COUNT=len(seeds))
    assert torch.equal(out.cpu(), reference._uniform(seeds, tokens))


def test_uniform_numbers_are_those_of_triton(on_triton: OnTriton) -> None:
    numbers = torch.randint(-(2**62), 2**62, (2, 64), generator=torch.Generator().manual_seed(0))
    on_triton(check_like_triton, numbers[0], numbers[1].abs())


@pytest.mark.parametrize("noise", [False, True])
def test_shards_of_a_vocabulary(on_triton: OnTriton, noise: bool) -> None:
    states, weight = whole_numbers(6, 8), whole_numbers(301, 8, seed=1)
    options = {"temperature": torch.ones(6), "seeds": torch.arange(6)} if noise else {}
    whole = reference.exit_head(states, weight, **options)
    parts = [
        on_triton(check_equal, states, weight[begin:end], options | {"first_token": begin})
        for begin, end in ((0, 100), (100, 230), (230, 301))
    ]
    merged = merge(HeadTokens(*(torch.stack(values) for values in zip(*parts, strict=True))))
    for ours, theirs in zip(merged, whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def check_beyond_31_bits(device: str) -> None:
    """Rows of a head that lie 2^26 elements apart: only the pages that are read take memory."""
    stride, vocabulary, hidden = 2**26, 40, 16
    memory = torch.zeros(stride * (vocabulary - 1) + hidden, dtype=torch.float8_e4m3fn, device=device)
    weight = memory.as_strided((vocabulary, hidden), (stride, 1))
    weight.copy_(numbers(vocabulary, hidden, seed=1).to(torch.float8_e4m3fn))
    assert memory.numel() > 2**31
    from vllm_del.kernels.exit_head import triton

    states = numbers(4, hidden).to(device)
    given = triton.exit_head(states, weight)
    assert torch.equal(given.token, reference.exit_head(states, weight.contiguous()).token)


def test_a_head_of_more_than_31_bits(on_triton: OnTriton) -> None:
    on_triton(check_beyond_31_bits)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_reference_is_what_torch_says(dtype: torch.dtype) -> None:
    states, weight, norm = numbers(5, 24, dtype=dtype), numbers(90, 24, seed=1, dtype=dtype), numbers(24, seed=2)
    given = reference.exit_head(states, weight, norm_weight=norm, epsilon=1e-5)
    normed = torch.nn.functional.rms_norm(states.float(), (24,), norm, 1e-5).to(dtype)
    probabilities = torch.softmax(normed.float() @ weight.float().T, 1)
    assert torch.equal(given.token, probabilities.argmax(1))
    torch.testing.assert_close(given.probability, probabilities.amax(1), rtol=1e-3, atol=1e-4)
