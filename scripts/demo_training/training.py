"""Training: one part of the recipe, from one folder's checkpoint, or from scratch, to another's. See `recipe.py`."""

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
from transformers import LlamaForCausalLM

from demo_training.muon import Muon
from demo_training.recipe import Part, Recipe
from demo_training.text import BOS_ID

console = Console()

TOOK = "took.json"
"""In a model's folder: what a part of its training took."""


@dataclass
class Trainer:
    model: LlamaForCausalLM
    recipe: Recipe
    part: Part
    generator: torch.Generator
    losses: dict[int, float] = field(default_factory=dict)  # smoothed, by number of layers
    computed_in: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.computed_in = computed_in(self.model.device)
        hidden = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in self.model.named_parameters() if p.ndim == 1 or "embed" in n]
        lr, decay = self.part.lr, self.recipe.weight_decay
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(hidden, lr, decay, self.computed_in),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def layer_dropout(self, time: float, batch: int, device: torch.device) -> Tensor:
        """Which sequences go through which layers: bool [L, B, 1, 1]."""
        depth = torch.arange(self.recipe.layers) / (self.recipe.layers - 1)
        skip = self.recipe.dropout * (2.0**time - 1) * (2.0**depth - 1)
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

    def loss(self, windows: Tensor, step: int, time: float) -> Tensor:
        """The early-exit loss J of windows [B, T + 1] at time t."""
        layers, part = self.recipe.layers, self.part
        norm, head = self.model.model.norm.weight, self.model.lm_head.weight
        ids, labels = windows[:, :-1], windows[:, 1:].flatten()
        states = self.trunk(ids, self.layer_dropout(time, len(ids), ids.device))
        logits = read_out(states[-1].flatten(0, 1), norm, head)
        losses = {layers: F.cross_entropy(logits, labels)}
        total, weights = losses[layers], 1.0
        some = slice(step // part.rotation % part.stride, None, part.stride)
        log_p = logits[some].log_softmax(-1)
        p = log_p.exp()
        target = p.detach() * time
        target[torch.arange(len(target)), labels[some]] += 1 - time
        for depth in range(1 + step % part.rotation, layers, part.rotation):
            log_q = read_out(states[depth - 1].flatten(0, 1)[some], norm, head).log_softmax(-1)
            losses[depth] = -(target * log_q).sum(-1).mean()
            meeting = (p * (log_p - log_q.detach())).sum(-1).mean() if part.meeting else 0.0
            scale = part.exit_scale(depth)
            total, weights = total + scale * (losses[depth] + part.meeting * meeting), weights + scale
        for depth, value in losses.items():
            self.losses[depth] = 0.9 * self.losses.get(depth, value.item()) + 0.1 * value.item()
        return total / weights

    def step(self, windows: Tensor, step: int, progress: float, next_progress: float) -> float:
        """One update on windows [B, T + 1], at a learning rate warmed up and then cosine.

        Returns the progress after it, on which all workers agree.
        """
        rate = self.part.lr * min(progress / 0.02, 0.5 + 0.5 * math.cos(math.pi * progress))
        with torch.autocast(windows.device.type, torch.bfloat16, enabled=self.computed_in == torch.bfloat16):
            loss = self.loss(windows, step, self.part.time(progress))
        loss.backward()
        next_progress = average_gradients(list(self.model.parameters()), next_progress)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = max(rate, self.part.lr / 1000)
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
    rank: int,
    workers: int,
    recipe: Recipe,
    part: Part,
    stream: Tensor,
    seed: int,
    minutes: float,
    device: str,
    start: Path | None,
    new: Path,
) -> None:
    """Train on the stream [n] from the checkpoint `start`, or from scratch; save the model in `new`, and what it took.

    On a CPU there is one worker a core and the batch is split between them: threads that share an operation wait for
    each other in each one, which on a machine that has other work is most of the time. The schedule ends with the
    tokens or with the minutes.
    """
    keep_freed_memory()
    if workers > 1:
        torch.set_num_threads(1)
        rendezvous = f"file://{new.absolute()}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=workers)
    torch.manual_seed(seed)  # all start from the same weights, but see other text
    generator = torch.Generator().manual_seed(seed * workers + rank)
    model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32) if start else LlamaForCausalLM(recipe.config())
    trainer = Trainer(model.to(device), recipe, part, generator)
    seen, step, progress, began = 0, 0, 0.0, time.monotonic()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=rank > 0 or not console.is_terminal) as bar:
        task = bar.add_task("tokens", total=part.tokens)
        while progress < 1:
            batch, length = part.batch(step, progress)
            windows = sample_windows(stream, batch // workers, length, generator).to(device)
            seen, step = seen + batch * length, step + 1
            clock = (time.monotonic() - began) / 60 / minutes
            progress = trainer.step(windows, step, progress, max(seen / part.tokens, clock))
            losses = " ".join(f"{d}:{v:.2f}" for d, v in sorted(trainer.losses.items()))
            speed = seen / (time.monotonic() - began)
            bar.update(task, completed=seen, description=f"{speed:,.0f} tokens/s  loss by layer {losses}")
            if rank == 0 and not console.is_terminal and step % 50 == 0:
                console.print(f"{progress:6.1%} {seen:,} tokens {speed:,.0f}/s loss {losses}", soft_wrap=True)
    if rank == 0:
        wall, cpu = (time.monotonic() - began) / 60, time.process_time() / 60
        took = {
            "tokens": seen,
            "steps": step,
            "minutes": round(wall, 1),
            "processor_minutes": round(cpu, 1),
            "workers": workers,
            "computed_in": str(trainer.computed_in).removeprefix("torch."),
            "hardware": hardware(),
            "torch": torch.__version__,
        }
        trainer.model.to("cpu", torch.bfloat16).save_pretrained(new)
        (new / TOOK).write_text(json.dumps(took))
    if workers > 1:
        dist.destroy_process_group()
        (new / "rendezvous").unlink(missing_ok=True)


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
