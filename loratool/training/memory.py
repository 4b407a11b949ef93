"""The peak memory of a run."""

from __future__ import annotations

import resource


def peak_memory(device: str) -> int:
    """Return the peak memory in bytes: torch's peak allocation on CUDA, or this process's peak resident size on a CPU."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
