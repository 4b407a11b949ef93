"""Work on the modules of an adapter, several at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Final, TypeVar

from loratool.checkpoint.threads import in_threads

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_WORKERS: Final = 4
"""More than these only wait for memory."""


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The result of `work` for each of `items`, in their order; the first error stops everything and is raised.

    Each item has one thread to itself. LAPACK's own threads wait for each other at every column of a thin matrix: where the
    machine has other work to do, two of them take fifty times as long as one.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return in_threads(work, items, min(MOST_WORKERS, len(os.sched_getaffinity(0))))
    finally:
        torch.set_num_threads(threads)
