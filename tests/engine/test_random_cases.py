"""Hundreds of random cases: any prompts, exits, draft lengths and batch give what vLLM gives without speculation."""

import random
from pathlib import Path

import pytest

from tests.engine.checkpoints import VOCAB, checkpoint
from tests.engine.host import LENGTHS, Arrival, Host

MODELS = [(architecture, seed) for architecture in ("llama", "qwen2", "qwen3", "llama-tied") for seed in (1, 2, 3)]
# More than two hundred on V1; on V2, in Triton's interpreter, each takes several times as long.
CASES_PER_MODEL = {"v1": 17, "v2": 6}
POLICIES = [{"del_policy": "fixed"}, {"del_objective": "tpl"}, {"del_objective": "goodput"}]

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(("architecture", "seed"), MODELS)
def test_random_cases(host: Host, checkpoints: Path, architecture: str, seed: int) -> None:
    """All cases of a model share its engines; requests arrive at random steps and are of random lengths."""
    rng = random.Random(f"{architecture} {seed}")
    model = checkpoint(checkpoints, architecture, seed)
    policy = POLICIES[MODELS.index((architecture, seed)) % len(POLICIES)]
    specs = [
        # Exit and length as a policy has them, and as they are drawn for each row in each round.
        {
            "method": "del",
            **policy,
            "del_exit_layers": rng.sample([1, 2, 3], 1 if "del_policy" in policy else rng.randint(1, 3)),
            "num_speculative_tokens": rng.choice(LENGTHS),
        },
        {"method": "del", "del_exit_layers": [1, 2, 3], "num_speculative_tokens": max(LENGTHS)},
    ]
    engine = {"max_num_batched_tokens": rng.choice([24, 64, 200]), "enable_prefix_caching": rng.random() < 0.5}
    accepted = [0, 0]
    for case in range(CASES_PER_MODEL[host.runner]):
        arrivals = _requests(rng, host.runner)
        off = host.serve(model, arrivals, **engine)
        drawn = case % 2
        on = host.serve(model, arrivals, specs[drawn], plans=rng.getrandbits(32) if drawn else None, **engine)
        assert on.completions == off.completions, f"case {case}: {specs[drawn]}, {engine}, {arrivals}"
        accepted[drawn] += on.accepted
    assert all(accepted), f"drafts accepted under each of {specs}: {accepted}"


def _requests(rng: random.Random, runner: str) -> list[Arrival]:
    """A batch of one to eight requests, some of them sharing a prefix.

    Fewer and shorter on V2, which runs in Triton's interpreter here, some hundred times slower.
    """
    shared = _tokens(rng, 80)
    return [
        Arrival(
            prompt=shared[: rng.randint(0, 80)] + _tokens(rng, rng.choice([1, 1, 2, 10, 60])),
            sampling={
                "temperature": 0,
                "max_tokens": rng.randint(1, 24 if runner == "v1" else 16),
                "ignore_eos": rng.random() < 0.8,
                "stop_token_ids": _tokens(rng, rng.choice([0, 0, 3])),
                "detokenize": False,
            },
            step=rng.choice([0, 0, 0, 1, 4, 9]),
        )
        for _ in range(rng.randint(1, 8 if runner == "v1" else 4))
    ]


def _tokens(rng: random.Random, number: int) -> list[int]:
    return [rng.randrange(4, VOCAB) for _ in range(number)]
