"""Several workers that stream matrices: parallelism is over matrices, one of torch's threads a block."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Final

from loratool.checkpoint.copying import flushing
from loratool.interrupts import Deferral

MOST: Final = 6
"""More workers than this only wait for memory and disk."""

Job = Callable[[], None]
Task = Callable[[threading.Event], None]
"""Work on one matrix; it ends early when the event is set."""


def cpu_workers(*, computing: bool = False) -> int:
    """Two workers more than cores that this process may use: some compute while others wait for the disk.

    Where nearly all of the work is `computing`, as many as cores: more would take the caches and Python from one another.
    """
    return min(MOST, len(os.sched_getaffinity(0)) + (0 if computing else 2))


def work_through(tasks: Iterable[Task], *, workers: int, beside: Iterable[Job] = (), ahead: Iterable[Job] = (),
                 files: Collection[int] = ()) -> None:  # fmt: skip
    """Do all `tasks`, which need torch, in their order, on several workers; the first error stops everything and is raised.

    `beside` are other jobs (copies) that the same workers do, first: they can begin before torch is imported. Those of
    `ahead` are done only until it is. From then on what is written to the open `files` is also sent to the disk.

    Ctrl-C stops everything as an error does; `loratool.interrupts.check` tells a job that it came.
    """
    stop, ready = threading.Event(), threading.Event()

    def one(task: Task) -> None:
        if not stop.is_set():
            task(stop)

    def until_ready(job: Job) -> None:
        if not ready.is_set():
            job()

    def until_stopped(job: Job) -> None:
        if not stop.is_set():
            job()

    with Deferral(stop.set), ThreadPoolExecutor(workers) as pool:
        futures: list[Future[None]] = [pool.submit(until_stopped, job) for job in beside]
        early = [pool.submit(until_ready, job) for job in ahead]
        try:
            with _one_thread_a_block(), flushing(files):
                ready.set()
                wait(early)  # none may overwrite what a task wrote
                futures += early
                futures += [pool.submit(one, task) for task in tasks]
                wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            ready.set()
            stop.set()
            for future in [*futures, *early]:
                future.cancel()
        for future in futures:
            if not future.cancelled():
                future.result()


@contextmanager
def _one_thread_a_block() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
