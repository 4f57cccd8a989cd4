#!/usr/bin/env python3
"""Train the demo model: a small Llama whose every layer can speak, by the LayerSkip recipe.

    python scripts/train_demo_model.py                     # the shipped model: under an hour on two CPU cores
    python scripts/train_demo_model.py --quick --out DIR   # seconds; a complete, valid and useless checkpoint

The text is the source of the Python standard library of the interpreter that runs this, so nothing is downloaded.
`demo_training/training.py` says how it is trained.
"""

import json
import os
import platform
import shutil
from pathlib import Path
from typing import Annotated

import torch
import torch.multiprocessing as mp
import typer
from demo_training.card import CARD, hardware
from demo_training.scores import continuation, evaluate
from demo_training.text import HELD_OUT_ONE_IN, encode, read_corpus, train_tokenizer
from demo_training.training import Recipe, console, train
from transformers import LlamaForCausalLM

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
    tokens: Annotated[int, typer.Option(help="Tokens to train on.")] = Recipe.tokens,
    minutes: Annotated[float, typer.Option(help="End the schedule by then, if the tokens do not.")] = 240.0,
    layers: int = Recipe.layers,
    width: int = Recipe.width,
    workers: Annotated[int, typer.Option(help="CPU cores to use: 1 or 2.", min=1, max=2)] = 2,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda (minutes instead of an hour).")] = "auto",
    quick: Annotated[bool, typer.Option(help="Seconds: a tiny model that only has the right form.")] = False,
) -> None:
    """Train the demo model on the Python standard library with the LayerSkip recipe."""
    if quick:
        tokens, layers, width = 20_000, 4, 64
    small = tokens < 1_000_000  # too few for all of the text
    recipe = Recipe(layers, width, 1024 if small else Recipe.vocab, tokens)
    torch.manual_seed(seed)

    texts, held_out = read_corpus(max(1 << 20, 16 * tokens))
    tokenizer = train_tokenizer(texts, recipe.vocab)
    stream, held_out_stream = encode(tokenizer, texts), encode(tokenizer, held_out[:4] if small else held_out)
    console.print(f"{len(stream):,} tokens of {len(texts):,} files; {len(held_out_stream):,} held out")

    new = out.with_name(f".{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    workers = workers if place == "cpu" else 1
    arguments = (workers, recipe, stream, seed, minutes, place, new)
    if workers == 1:
        train(0, *arguments)
    else:
        mp.spawn(train, arguments, nprocs=workers)
    counts = json.loads((new / "counts").read_text())
    tokenizer.save_pretrained(new)
    for scrap in ("counts", "rendezvous"):
        (new / scrap).unlink(missing_ok=True)

    # What was saved is scored, not what was trained.
    model = LlamaForCausalLM.from_pretrained(new, dtype=torch.float32).eval()
    windows = 2 if small else 128
    scores = evaluate(model, held_out_stream, windows)
    rows = [f"| {s.depth} | {s.loss:.3f} | {s.agreement:.3f} | {s.accepted:.2f} |" for s in scores]
    card = CARD.format(
        **vars(recipe), **counts, seed=seed, table="\n".join(rows),
        parameters=model.num_parameters() / 1e6, size=sum(f.stat().st_size for f in new.iterdir()) / 1e6,
        scored=windows * 512, held_out=len(held_out_stream), one_in=HELD_OUT_ONE_IN,
        train_files=len(texts), train_tokens=len(stream), python=platform.python_version(), torch=torch.__version__,
        workers=workers, hardware=hardware(),
        sample=continuation(model, tokenizer, held_out_stream[len(held_out_stream) // 2 :][:96]),
    )  # fmt: skip
    (new / "README.md").write_text(card, "utf-8")
    (new / "model.safetensors").chmod(0o644)
    replace_folder(new, out)
    console.print(card, markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
