"""Host values to the device without waiting for it."""

from collections.abc import Sequence

import torch


def upload(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """`values` on the device, [len] int64."""
    on_host = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)
