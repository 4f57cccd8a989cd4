"""What the benchmark generates: from prompts of a synthetic model's classes, or pieces of files held out of training.

A workload is a name such as "mixed x4": what, and how many sequences at a time.
"""

import random
from pathlib import Path
from typing import Any

from synthetic import tokens_of
from transformers import AutoTokenizer

CLASSES = {"easy": ["easy"], "hard": ["hard"], "mixed": ["easy", "hard", "turning easy", "turning hard"]}
"""Of a mixed batch's sequences a quarter each: easy, hard, and two that change while they are generated."""

HELD_OUT = "held-out"
PIECES = 16
"""Pieces of held-out files that a workload continues, whatever its number at a time."""

PROMPT_TOKENS = 32

Prompt = dict[str, Any]


def default_workloads(model: Path) -> str:
    """Those that make sense for this model."""
    if (model / "synthetic.json").exists():
        return "easy x1,easy x4,easy x8,hard x1,hard x2,hard x4,hard x8,hard x16,mixed x4,mixed x8"
    return f"{HELD_OUT} x1,{HELD_OUT} x4,{HELD_OUT} x8"


def batches_of(workload: str, model: Path, vocab_size: int) -> list[list[Prompt]]:
    """Prompts, in batches to be generated one after the other; the same ones at each call."""
    kind, number = workload.split(" x")
    size, rng = int(number), random.Random(0)
    if kind == HELD_OUT:
        prompts = _held_out(model, rng)
        return [prompts[begin : begin + size] for begin in range(0, len(prompts), size)]
    names = [CLASSES[kind][i % len(CLASSES[kind])] for i in range(size)]
    return [[{"prompt_token_ids": rng.choices(tokens_of(vocab_size, name), k=PROMPT_TOKENS)} for name in names]]


def _held_out(model: Path, rng: random.Random) -> list[Prompt]:
    """Pieces out of the middle of files that the demo model was not trained on."""
    from demo_training.text import read_corpus

    tokenizer = AutoTokenizer.from_pretrained(model)
    _, texts = read_corpus(limit=0)
    prompts: list[Prompt] = []
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"]
        if len(ids) >= 4 * PROMPT_TOKENS and len(prompts) < PIECES:
            begin = rng.randrange(len(ids) // 4, len(ids) // 2)
            prompts.append({"prompt_token_ids": ids[begin : begin + PROMPT_TOKENS]})
    return prompts
