"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon): momentum, made orthogonal, for matrices.

As `torch.optim.Muon`, but in a type that the processor computes in (torch's is always bfloat16, which many emulate),
and with the work shared out: each worker makes a part of the matrices orthogonal, and all get all of them.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

COEFFICIENTS = 3.4445, -4.775, 2.0315
"""Of the iteration's polynomial: steepest at zero, so that five rounds are enough."""


class Muon(torch.optim.Optimizer):
    """Steps as large as AdamW's by their mean square (`match_rms_adamw` of torch's)."""

    def __init__(
        self, matrices: Iterable[Tensor], lr: float, weight_decay: float, dtype: torch.dtype, momentum: float = 0.95
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self._dtype, self._momentum = dtype, momentum

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            updates = [torch.zeros_like(p) for p in matrices]
            for place, p in enumerate(matrices):
                if p not in self.state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                average = self.state[p]["momentum_buffer"]
                average.lerp_(p.grad, 1 - self._momentum)
                if place % workers == rank:
                    updates[place] = orthogonal(p.grad.lerp(average, self._momentum).to(self._dtype)).to(p.dtype)
            if workers > 1:
                flat = torch.cat([update.flatten() for update in updates])
                dist.all_reduce(flat)
                parts = flat.split([p.numel() for p in matrices])
                updates = [part.view_as(p) for part, p in zip(parts, matrices, strict=True)]
            for p, update in zip(matrices, updates, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update, alpha=0.2 * group["lr"] * math.sqrt(max(p.shape)))


def orthogonal(matrix: Tensor, rounds: int = 5) -> Tensor:
    """The matrix [m, n] with its singular values brought near to one, by the Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x
