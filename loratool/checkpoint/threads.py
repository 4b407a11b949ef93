"""Work on many items in several threads, which an error or Ctrl-C stops."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Final, TypeVar

from loratool.interrupts import Deferral, check

Item = TypeVar("Item")
Result = TypeVar("Result")

SECONDS_BETWEEN_LOOKS: Final = 0.1
"""Interval of checks for Ctrl-C while threads wait for the network."""


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int, *, leave: bool = False
) -> list[Result]:
    """Return the result of `work` for each of `items`, in order. The first error stops the rest and is raised.

    Ctrl-C stops the work, too, but is raised only at the end: an exception in between could leave a lock taken that the
    threads wait for (`loratool.interrupts`). Work that is running is waited for; with `leave` (for threads that may hang in
    the network) it is abandoned.
    """

    def one(item: Item) -> Result:
        check()
        return work(item)

    pool = ThreadPoolExecutor(workers)
    with Deferral() as deferral:
        try:
            futures: list[Future[Result]] = [pool.submit(one, item) for item in items]
            failed = _first_failure(futures, deferral if leave else None)
        finally:
            pool.shutdown(wait=not leave, cancel_futures=True)
        if failed is not None:
            failed.result()
    return [future.result() for future in futures]


def _first_failure(futures: list[Future[Result]], deferral: Deferral | None) -> Future[Result] | None:
    """Wait for all, for the first failure, or for Ctrl-C; return the future that failed, if any."""
    waiting = set(futures)
    while waiting and (deferral is None or deferral.number is None):
        done, waiting = wait(
            waiting, timeout=None if deferral is None else SECONDS_BETWEEN_LOOKS, return_when=FIRST_EXCEPTION
        )
        for future in done:
            if future.exception() is not None:
                return future
    return None
