"""Workers that stream matrices in parallel, with one torch thread for each block."""

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
"""Limit of workers; more would only wait for memory and disk."""

Job = Callable[[], None]
Task = Callable[[threading.Event], None]
"""Work on one matrix; it ends early when the event is set."""


def cpu_workers(*, computing: bool = False) -> int:
    """Return two workers more than this process's cores: some compute while others wait for the disk.

    If nearly all of the work is `computing`, return the number of cores: more would compete for caches and the interpreter.
    """
    return min(MOST, len(os.sched_getaffinity(0)) + (0 if computing else 2))


def work_through(tasks: Iterable[Task], *, workers: int, beside: Iterable[Job] = (), ahead: Iterable[Job] = (),
                 files: Collection[int] = ()) -> None:  # fmt: skip
    """Do all `tasks`, which need torch, in order on several workers. The first error stops everything and is raised.

    The workers first do the `beside` jobs (copies), which can begin before torch is imported. The `ahead` jobs are done only
    until torch is imported; from then on, data written to the open `files` is also flushed to disk. Ctrl-C stops everything
    like an error; `loratool.interrupts.check` raises it inside a job.
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
                wait(early)  # an early job must not overwrite what a task wrote
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
