#!/usr/bin/env python3
"""Train the demo model: a small Llama whose every layer can speak, by the LayerSkip recipe.

    python scripts/train_demo_model.py                     # the shipped model: under an hour on two CPU cores
    python scripts/train_demo_model.py --quick --out DIR   # seconds; a complete, valid and useless checkpoint
    python scripts/train_demo_model.py --meet DIR          # its second part only, from a checkpoint of the first

The text is the source of the Python standard library of the interpreter that runs this, so nothing is downloaded.
`demo_training/recipe.py` says how it is trained.
"""

import json
import os
import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import torch.multiprocessing as mp
import typer
from demo_training.card import CARD, scores_of, took_by
from demo_training.recipe import LAYER_SKIP, MEETING, Recipe
from demo_training.scores import continuation, evaluate
from demo_training.text import HELD_OUT_ONE_IN, encode, read_corpus, train_tokenizer
from demo_training.training import TOOK, console, train
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

RECORD = "training.json"
"""In a model's folder: what each part of its training took, and how good the model was after it."""

OUT = Path(__file__).parent / "demo_model"


def replace_folder(new: Path, out: Path) -> None:
    """Put a finished folder in the place of an older one; at no time is there half a model at `out`."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(new, out)
    shutil.rmtree(old, ignore_errors=True)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the finished model; replaced if it exists.")] = OUT,
    seed: int = 0,
    meet: Annotated[Path | None, typer.Option(help="Only the second part, from this checkpoint of the first.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on; the recipe's if not said.")] = None,
    minutes: Annotated[float, typer.Option(help="End the schedule by then, if the tokens do not.")] = 55.0,
    layers: int = Recipe.layers,
    width: int = Recipe.width,
    workers: Annotated[int, typer.Option(help="CPU cores to use: 1 or 2.", min=1, max=2)] = 2,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda (minutes instead of an hour).")] = "auto",
    quick: Annotated[bool, typer.Option(help="Seconds: a tiny model that only has the right form.")] = False,
) -> None:
    """Train the demo model on the Python standard library with the LayerSkip recipe."""
    if quick:
        tokens, layers, width = 20_000, 4, 64
    if meet and not (meet / RECORD).exists():
        raise typer.BadParameter(f"{meet} has no {RECORD}: it is no checkpoint of this script", param_hint="--meet")
    records = json.loads((meet / RECORD).read_text()) if meet else []
    parts = (MEETING,) if meet else (LAYER_SKIP, MEETING)
    small = (tokens := tokens or sum(part.tokens for part in parts)) < 1_000_000  # too few for all of the text
    torch.manual_seed(seed)

    texts, held_out = read_corpus(limit=1 << 20 if small else 1 << 30)
    if meet:
        tokenizer, config = AutoTokenizer.from_pretrained(meet), AutoConfig.from_pretrained(meet)
        layers, width = config.num_hidden_layers, config.hidden_size
    else:
        tokenizer = train_tokenizer(texts, 1024 if small else Recipe.vocab)
    recipe = Recipe(parts, layers, width, len(tokenizer)).of_tokens(tokens)
    stream, held_out_stream = encode(tokenizer, texts), encode(tokenizer, held_out[:4] if small else held_out)
    console.print(f"{len(stream):,} tokens of {len(texts):,} files; {len(held_out_stream):,} held out")

    new = out.with_name(f".{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    workers, windows, start = workers if place == "cpu" else 1, 2 if small else 128, meet
    for part in recipe.parts:
        its_minutes = minutes * part.tokens / recipe.tokens
        its_seed = seed + len(records)  # for each part other text
        mp.spawn(train, (workers, recipe, part, stream, its_seed, its_minutes, place, start, new), nprocs=workers)
        start = new
        # What was saved is scored, not what was trained.
        model = LlamaForCausalLM.from_pretrained(new, dtype=torch.float32).eval()
        scores = [asdict(score) for score in evaluate(model, held_out_stream, windows)]
        records.append({"seed": its_seed, **json.loads((new / TOOK).read_text()), "scores": scores})
    (new / TOOK).unlink()
    tokenizer.save_pretrained(new)
    (new / RECORD).write_text(json.dumps(records, indent=1) + "\n")
    card = CARD.format(
        **vars(recipe), scores=scores_of(records), took=took_by(records),
        minutes=sum(record["minutes"] for record in records),
        rates=" and ".join(str(part.lr) for part in (LAYER_SKIP, MEETING)),
        parameters=model.num_parameters() / 1e6, size=sum(f.stat().st_size for f in new.iterdir()) / 1e6,
        scored=windows * 512, held_out=len(held_out_stream), one_in=HELD_OUT_ONE_IN,
        train_files=len(texts), train_tokens=len(stream), python=platform.python_version(),
        sample=continuation(model, tokenizer, held_out_stream[len(held_out_stream) // 2 :][:96]),
    )  # fmt: skip
    (new / "README.md").write_text(card, "utf-8")
    (new / "model.safetensors").chmod(0o644)
    replace_folder(new, out)
    console.print(card, markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
