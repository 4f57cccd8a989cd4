"""In which type to compute a model whose weights are of bfloat16."""

import torch


def computed_in(device: torch.device) -> torch.dtype:
    """bfloat16, or float32 on a CPU that would emulate it, thirty times slower: AVX-512 is what tells, more or less."""
    is_fast = device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.bfloat16 if is_fast else torch.float32
