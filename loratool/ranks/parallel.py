"""Work on the modules of an adapter in parallel threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Final, TypeVar

from loratool.checkpoint.threads import in_threads

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_WORKERS: Final = 4
"""Beyond this many workers, memory bandwidth is the limit."""


def in_parallel(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return the results of `work`, in the order of `items`; the first error stops the work and is raised.

    Each item gets one thread of computation. LAPACK's own threads wait for each other at every column of a thin matrix. On a
    busy machine, two of them take fifty times as long as one.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return in_threads(work, items, min(MOST_WORKERS, len(os.sched_getaffinity(0))))
    finally:
        torch.set_num_threads(threads)
