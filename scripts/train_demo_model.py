#!/usr/bin/env python3
"""Train the demo model: a small Llama whose every layer can speak, by the LayerSkip recipe.

    python scripts/train_demo_model.py                     # the shipped model: under an hour on two CPU cores
    python scripts/train_demo_model.py --quick --out DIR   # seconds; a complete, valid and useless checkpoint

The text is the source of the Python standard library of the interpreter that runs this, so nothing is downloaded.
The recipe is LayerSkip's (Elhoushi et al., 2024, https://arxiv.org/abs/2404.16710, section 4), for L layers
l = 0..L-1 and training progress t in [0, 1]:

* layer dropout: a sequence skips layer l with probability  S(t) * D(l) * p_max,  D(l) = exp(l ln2 / (L-1)) - 1
  and, as training starts from scratch, S(t) = exp(t ln2) - 1: rare in early layers and early in training;
* early-exit loss: every layer is read out through the *same* final norm and LM head, and
  J = sum_l e~(l) CE(head(norm(x_{l+1})), y)  with  e~(l) = C(t, l) e(l) / sum_i C(t, i) e(i);
* rotational curriculum: C(t, l) is 1 for every R-th layer, shifted by one each step, and always for the last layer.

Differences, each of them in aid of a small budget: e(l) is the same for all exits (the paper's grows with l; this
favours exits at the first few layers, which are the cheap drafts of a small model); an exit is scored on half of the
positions of its step; and its target turns, as training goes on, from the text alone to what the last layer makes of
the text, (1 - t) y + t softmax(head(norm(x_L))): a draft has to be what the last layer would say, right or wrong.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import platform
import shutil
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1
EXCLUDED = ["site-packages", "encodings", "cjkencodings", "pydoc_data", "decimaltestdata", "lib2to3/tests"]
HELD_OUT_ONE_IN = 64
OUT = Path(__file__).parent / "demo_model"

console = Console()


@dataclass(frozen=True)
class Recipe:
    """Everything the result depends on besides the text and the seed."""

    layers: int = 8
    width: int = 256
    vocab: int = 4096
    tokens: int = 14_000_000
    lr: float = 3e-3
    weight_decay: float = 0.1
    dropout: float = 0.1  # p_max of layer dropout
    exit_scale: float = 1.0  # e(l) of an early exit; the last layer has 1
    rotation: int = 4  # R: one exit in R is scored at a step ...
    stride: int = 2  # ... on one position in `stride`

    def config(self) -> LlamaConfig:
        heads = max(1, self.width // 64)
        return LlamaConfig(
            vocab_size=self.vocab, hidden_size=self.width, num_hidden_layers=self.layers, head_dim=64,
            num_attention_heads=heads, num_key_value_heads=max(1, heads // 2), intermediate_size=self.width * 11 // 4,
            max_position_embeddings=2048, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=BOS_ID, eos_token_id=EOS_ID,
        )  # fmt: skip

    def batch(self, step: int, progress: float) -> tuple[int, int]:
        """Windows in a batch and their length: many small steps do more here than few big ones. Short at first, as
        attention is dear on a CPU; then longer, one in nine of the full context (nine, so that every exit sees some).
        """
        if progress < 0.6:
            return 8, 256
        return (2, 2048) if step % 9 == 0 else (4, 512)


# ---------------------------------------------------------------------------------------------------------- text


def read_corpus(limit: int) -> tuple[list[str], list[str]]:
    """Source files for training and held-out ones, in an order and a split given by the hash of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = {p.relative_to(root).as_posix(): p for p in root.rglob("*.py")}
    digest = {name: int(hashlib.sha256(name.encode()).hexdigest(), 16) for name in paths}
    train: list[str] = []
    held_out: list[str] = []
    for name in sorted(paths, key=digest.__getitem__):
        if any(f"/{part}/" in f"/{name}" for part in EXCLUDED):
            continue
        try:
            text = paths[name].read_text("utf-8")
        except UnicodeDecodeError:
            continue  # the test suite has broken files on purpose
        letters = sum(text.count(c) for c in "etaoinsrhldcu_ \n")
        if not text or letters < len(text) * 0.5:
            continue  # tables and other data in the shape of a program
        if digest[name] % HELD_OUT_ONE_IN == 0:
            held_out.append(text)
        elif (limit := limit - len(text)) > 0:
            train.append(text)
    return train, held_out


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that starts every text with BOS, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, model_max_length=2048)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All texts as one stream of ids [n], each text between BOS and EOS."""
    rows = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor([i for row in rows for i in (*row, EOS_ID)])


# ------------------------------------------------------------------------------------------------------ training


@dataclass
class Trainer:
    model: LlamaForCausalLM
    recipe: Recipe
    generator: torch.Generator
    losses: dict[int, float] = field(default_factory=dict)  # smoothed, by number of layers

    def __post_init__(self) -> None:
        hidden = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in self.model.named_parameters() if p.ndim == 1 or "embed" in n]
        lr, decay = self.recipe.lr, self.recipe.weight_decay
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(hidden, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def layer_dropout(self, progress: float, batch: int, device: torch.device) -> Tensor:
        """Which sequences go through which layers: bool [L, B, 1, 1]."""
        depth = torch.arange(self.recipe.layers) / (self.recipe.layers - 1)
        skip = self.recipe.dropout * (2.0**progress - 1) * (2.0**depth - 1)
        keep = torch.rand(self.recipe.layers, batch, generator=self.generator) >= skip[:, None]
        return keep[:, :, None, None].to(device)

    def trunk(self, ids: Tensor, keep: Tensor) -> list[Tensor]:
        """Hidden states after each layer: ids [B, T] -> L tensors [B, T, W]."""
        core = self.model.model
        x = core.embed_tokens(ids)
        rope = core.rotary_emb(x, torch.arange(ids.shape[1], device=ids.device)[None])
        states = []
        for layer, kept in zip(core.layers, keep, strict=True):
            x = torch.where(kept, layer(x, position_embeddings=rope, attention_mask=None), x)
            states.append(x)
        return states

    def loss(self, windows: Tensor, step: int, progress: float) -> Tensor:
        """The early-exit loss J of windows [B, T + 1]."""
        r = self.recipe
        norm, head = self.model.model.norm.weight, self.model.lm_head.weight
        ids, labels = windows[:, :-1], windows[:, 1:].flatten()
        states = self.trunk(ids, self.layer_dropout(progress, len(ids), ids.device))
        logits = read_out(states[-1].flatten(0, 1), norm, head)
        total = {r.layers: F.cross_entropy(logits, labels)}
        some = slice(step // r.rotation % r.stride, None, r.stride)
        target = logits.detach()[some].softmax(-1).mul_(progress)
        target[torch.arange(len(target)), labels[some]] += 1 - progress
        for depth in range(1 + step % r.rotation, r.layers, r.rotation):
            total[depth] = F.cross_entropy(read_out(states[depth - 1].flatten(0, 1)[some], norm, head), target)
        for depth, value in total.items():
            self.losses[depth] = 0.9 * self.losses.get(depth, value.item()) + 0.1 * value.item()
        weights = {depth: 1.0 if depth == r.layers else r.exit_scale for depth in total}
        return sum(weights[d] * total[d] for d in total) / sum(weights.values())

    def step(self, windows: Tensor, step: int, progress: float, next_progress: float) -> float:
        """One update on windows [B, T + 1], at a learning rate warmed up and then cosine.

        Returns the progress after it, on which all workers agree.
        """
        rate = self.recipe.lr * min(progress / 0.02, 0.5 + 0.5 * math.cos(math.pi * progress))
        with torch.autocast(windows.device.type, torch.bfloat16):
            loss = self.loss(windows, step, progress)
        loss.backward()
        next_progress = average_gradients(list(self.model.parameters()), next_progress)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = max(rate, self.recipe.lr / 1000)
            optimizer.step()
            optimizer.zero_grad()
        return next_progress


def average_gradients(parameters: list[Tensor], progress: float) -> float:
    """Average the gradients, and the progress, over the workers, in one message; returns the progress."""
    if not dist.is_initialized():
        return progress
    flat = torch.cat([p.grad.flatten() for p in parameters] + [torch.tensor([progress])]) / dist.get_world_size()
    dist.all_reduce(flat)
    *grads, mean = flat.split([p.numel() for p in parameters] + [1])
    for p, grad in zip(parameters, grads, strict=True):
        p.grad.copy_(grad.view_as(p))
    return mean.item()


def read_out(x: Tensor, norm: Tensor, head: Tensor) -> Tensor:
    """Logits [N, V] of hidden states x [N, W] by the shared norm [W] and head [V, W]."""
    return F.linear(F.rms_norm(x.float(), norm.shape, norm, 1e-5), head).float()


def sample_windows(stream: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Random windows [B, T + 1] of the stream; each begins with BOS, as a prompt does."""
    starts = torch.randint(len(stream) - length, (batch, 1), generator=generator)
    windows = stream[starts + torch.arange(length + 1)]
    windows[:, 0] = BOS_ID
    return windows


def train(
    rank: int, workers: int, recipe: Recipe, stream: Tensor, seed: int, minutes: float, device: str, new: Path
) -> None:
    """Train on the stream [n] and save the model in folder `new`, with the counts for the card in `new`/counts.

    On a CPU there is one worker a core and the batch is split between them: threads that share an operation wait for
    each other in each one, which on a machine that has other work is most of the time. The schedule ends with the
    tokens or with the minutes.
    """
    keep_freed_memory()
    if workers > 1:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{new.absolute()}/rendezvous", rank=rank, world_size=workers
        )
    torch.manual_seed(seed)  # all start from the same weights, but see other text
    generator = torch.Generator().manual_seed(seed * workers + rank)
    trainer = Trainer(LlamaForCausalLM(recipe.config()).to(device), recipe, generator)
    seen, step, progress, began = 0, 0, 0.0, time.monotonic()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=rank > 0 or not console.is_terminal) as bar:
        task = bar.add_task("tokens", total=recipe.tokens)
        while progress < 1:
            batch, length = recipe.batch(step, progress)
            windows = sample_windows(stream, batch // workers, length, generator).to(device)
            seen, step = seen + batch * length, step + 1
            clock = (time.monotonic() - began) / 60 / minutes
            progress = trainer.step(windows, step, progress, max(seen / recipe.tokens, clock))
            losses = " ".join(f"{d}:{v:.2f}" for d, v in sorted(trainer.losses.items()))
            speed = seen / (time.monotonic() - began)
            bar.update(task, completed=seen, description=f"{speed:,.0f} tokens/s  loss by layer {losses}")
            if rank == 0 and not console.is_terminal and step % 50 == 0:
                console.print(f"{progress:6.1%} {seen:,} tokens {speed:,.0f}/s loss {losses}", soft_wrap=True)
    if rank == 0:
        trainer.model.to("cpu", torch.bfloat16).save_pretrained(new)
        wall, cpu = (time.monotonic() - began) / 60, time.process_time() / 60
        (new / "counts").write_text(json.dumps({"steps": step, "seen": seen, "wall": wall, "cpu": cpu}))
    if workers > 1:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class ExitScore:
    depth: int
    loss: float
    agreement: float  # share of held-out positions where its argmax is the last layer's
    accepted: float  # mean tokens accepted of a draft of four, along the model's own greedy text


def exit_logits(model: LlamaForCausalLM, ids: Tensor) -> Iterator[Tensor]:
    """Logits [B, T, V] of each exit, 1 to L, for ids [B, T]."""
    states = model.model(ids, output_hidden_states=True).hidden_states[1:]
    for state in states[:-1]:
        yield model.lm_head(model.model.norm(state))
    yield model.lm_head(states[-1])  # transformers has normed this one


def accepted_of_draft(hits: list[bool], k: int = 4) -> tuple[int, int]:
    """Tokens accepted and rounds taken when drafts of k walk a greedy text; hits: exit and text agree there."""
    accepted = rounds = at = 0
    while at + k <= len(hits):
        run = next((i for i, hit in enumerate(hits[at : at + k]) if not hit), k)
        accepted, rounds, at = accepted + run, rounds + 1, at + run + 1  # + 1: the verifier's own token
    return accepted, rounds


@torch.inference_mode()
def evaluate(model: LlamaForCausalLM, stream: Tensor, windows: int, length: int = 512) -> list[ExitScore]:
    """Score every exit on windows spread evenly over the held-out stream [n]."""
    starts = torch.linspace(0, len(stream) - length - 1, windows).long()[:, None]
    rows = stream[starts + torch.arange(length + 1)]
    rows[:, 0] = BOS_ID
    layers = model.config.num_hidden_layers
    loss, same = torch.zeros(layers), torch.zeros(layers)
    for batch in rows.split(4):
        choices = []
        for i, logits in enumerate(exit_logits(model, batch[:, :-1])):
            loss[i] += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
            choices.append(logits.argmax(-1))
        same += torch.stack([(c == choices[-1]).sum() for c in choices])
    prompt, new = 64, 128
    text = model.generate(rows[:32, :prompt], max_new_tokens=new, min_new_tokens=new, do_sample=False)
    scores = []
    for i, logits in enumerate(exit_logits(model, text[:, :-1])):
        hits = (logits.argmax(-1) == text[:, 1:])[:, prompt - 1 :].tolist()
        accepted, rounds = (sum(n) for n in zip(*(accepted_of_draft(h) for h in hits), strict=True))
        count = windows * length
        scores.append(ExitScore(i + 1, loss[i].item() / count, same[i].item() / count, accepted / rounds))
    return scores


@torch.inference_mode()
def continuation(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: Tensor) -> str:
    """A prompt [T] and 160 sampled tokens as text, with a mark where the model's own begins."""
    torch.manual_seed(0)
    ids = model.generate(prompt[None], max_new_tokens=160, do_sample=True, temperature=0.5, top_k=0)[0]
    given, own = tokenizer.batch_decode([ids[: len(prompt)], ids[len(prompt) :]], skip_special_tokens=True)
    return f"{given}⟨{own}⟩"


# ---------------------------------------------------------------------------------------------------------- card

CARD = """\
---
license: apache-2.0
language: [code]
pipeline_tag: text-generation
tags: [llama, early-exit, layerskip, self-speculative-decoding]
---

# A small Llama trained for early exit

{layers} layers, {width} wide, {vocab:,} byte-level BPE tokens, {parameters:.2f} million parameters (tied embeddings),
bfloat16, {size:.1f} MB. It writes text in the shape of Python and knows nothing: it is here so that self-speculative
decoding can be run, tested and shown on real text without a download. A standard `LlamaForCausalLM` checkpoint.

## Quality

On {scored:,} tokens of files it was not trained on ({held_out:,} tokens in all), the saved bfloat16 weights computed in
float32. *Agreement*: how often the exit's most likely token is the last layer's. *Accepted*: mean tokens accepted
of a draft of four by that exit, on the model's own greedy text (32 prompts), which repeats itself and so is easier
to draft than real text.

| layers run | loss (nats/token) | agreement | accepted of 4 |
|---:|---:|---:|---:|
{table}

## Training

`scripts/train_demo_model.py`, seed {seed}: [LayerSkip](https://arxiv.org/abs/2404.16710) from scratch. Layer dropout
rising exponentially with depth to {dropout} and with time, early-exit loss through the shared norm and head with the
rotational curriculum (one exit in {rotation} at a step, weight {exit_scale}), the last layer always on.

- Data: the standard library of Python {python}, {train_files:,} files, {train_tokens:,} tokens, read where it was
  installed; tables, encodings and data files left out; one file in {one_in}, by the hash of its path, held out.
- Seen: {seen:,} tokens in {steps:,} steps: batches of 8 windows of 256, in the second half
  of 512, and one in nine of 2 windows of 2048.
- Muon for the matrices, AdamW for the rest; peak learning rate {lr}, cosine to zero; bfloat16 autocast.
- Time: {wall:.1f} minutes by the clock, {cpu:.1f} minutes of processor time on each of {workers} cores:
  about what it takes where these have nothing else to do. {hardware}; torch {torch}.

A run with the same Python and torch repeats it, but for the order of floating-point sums and, if `--minutes` ended it,
the number of steps.

## Sample

A piece of a held-out file, and in ⟨ ⟩ what the model made of it (temperature 0.5):

```python
{sample}
```

## Licence

The weights: Apache-2.0. They were trained on the source of CPython's standard library, which is under the
[PSF License Agreement](https://docs.python.org/3/license.html), copyright Python Software Foundation.
"""


def hardware() -> str:
    """The processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    device = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return device + (names[0] if names else platform.machine())


def keep_freed_memory() -> None:
    """Tell glibc not to hand big tensors back at each step, only to fault their pages in again."""
    libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    if libc is not None:
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped apart from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


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
        tokens, layers, width, workers = 20_000, 4, 64, 1
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
