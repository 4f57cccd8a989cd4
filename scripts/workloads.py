"""What the benchmark generates: from prompts of a synthetic model's classes, or pieces of files held out of training.

A workload is a name such as "mixed x4": what, and how many sequences at a time. As one ends the next one begins, as in
a server: a batch that is only waited for would be as slow as its slowest sequence, whatever the others gain.
"""

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from synthetic import tokens_of
from transformers import AutoTokenizer

CLASSES = {"easy": ["easy"], "hard": ["hard"], "mixed": ["easy", "hard", "turning easy", "turning hard"]}
"""Of a mixed batch's sequences a quarter each: easy, hard, and two that change while they are generated."""

HELD_OUT = "held-out"

PROMPT_TOKENS = 32


@dataclass(frozen=True)
class Request:
    """A prompt, and how many tokens to generate."""

    token_ids: list[int]
    length: int


def default_workloads(model: Path) -> str:
    """Those that make sense for this model."""
    if (model / "synthetic.json").exists():
        return "easy x1,easy x4,easy x8,hard x1,hard x2,hard x4,hard x8,hard x16,mixed x4,mixed x8"
    return f"{HELD_OUT} x1,{HELD_OUT} x4,{HELD_OUT} x8"


def requests_of(workload: str, model: Path, vocab_size: int, tokens: int, turn: int) -> tuple[int, list[Request]]:
    """How many at a time, and all of one turn, the same ones at each call; of half to one and a half times `tokens`.

    Each turn has others: what is accepted is the text's luck, and a few texts would flatter some draft lengths.
    """
    kind, places = workload.split(" x")
    rng = random.Random(f"{workload} {turn}")
    number = 2 * int(places)
    if kind == HELD_OUT:
        prompts = _held_out(model, number, rng)
    else:
        names = [CLASSES[kind][i % len(CLASSES[kind])] for i in range(number)]
        prompts = [rng.choices(tokens_of(vocab_size, name), k=PROMPT_TOKENS) for name in names]
    return int(places), [Request(prompt, rng.randint(tokens // 2, tokens * 3 // 2)) for prompt in prompts]


def _held_out(model: Path, number: int, rng: random.Random) -> list[list[int]]:
    """Pieces out of the middle of files that the demo model was not trained on."""
    files = _held_out_files(model)
    prompts = []
    for _ in range(number):
        ids = rng.choice(files)
        begin = rng.randrange(len(ids) // 4, len(ids) // 2)
        prompts.append(ids[begin : begin + PROMPT_TOKENS])
    return prompts


@cache
def _held_out_files(model: Path) -> list[list[int]]:
    from demo_training.text import read_corpus

    tokenizer = AutoTokenizer.from_pretrained(model)
    _, texts = read_corpus(limit=0)
    encoded = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    return [ids for ids in encoded if len(ids) >= 4 * PROMPT_TOKENS]
