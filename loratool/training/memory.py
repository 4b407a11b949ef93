"""How much memory a run has taken."""

from __future__ import annotations

import resource


def peak_memory(device: str) -> int:
    """Bytes: on CUDA the most that torch has allocated there, else the most that this process has had in memory."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
