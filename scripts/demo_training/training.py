"""Training by the LayerSkip recipe.

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

import ctypes
import json
import math
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from precision import computed_in
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from demo_training.muon import Muon
from demo_training.text import BOS_ID, EOS_ID

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


@dataclass
class Trainer:
    model: LlamaForCausalLM
    recipe: Recipe
    generator: torch.Generator
    losses: dict[int, float] = field(default_factory=dict)  # smoothed, by number of layers
    computed_in: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.computed_in = computed_in(self.model.device)
        hidden = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in self.model.named_parameters() if p.ndim == 1 or "embed" in n]
        lr, decay = self.recipe.lr, self.recipe.weight_decay
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(hidden, lr, decay, self.computed_in),
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
        with torch.autocast(windows.device.type, torch.bfloat16, enabled=self.computed_in == torch.bfloat16):
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
        counts = {
            "steps": step,
            "seen": seen,
            "wall": wall,
            "cpu": cpu,
            "computed_in": str(trainer.computed_in).removeprefix("torch."),
        }
        (new / "counts").write_text(json.dumps(counts))
    if workers > 1:
        dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Tell glibc not to hand big tensors back at each step, only to fault their pages in again."""
    libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    if libc is not None:
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped apart from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
