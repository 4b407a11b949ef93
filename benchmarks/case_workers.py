"""Many small cases in worker processes, so that one that crashes or hangs costs one line and not the run."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Final, TypeVar

Case = TypeVar("Case")
Result = TypeVar("Result")

CASES_EACH: Final = 150
"""Cases after which a worker is replaced by a new one, which frees what libraries keep."""


@dataclass(slots=True)
class Worker:
    process: Any
    pipe: Connection
    case: Any = None
    started: float = 0.0
    done: int = 0


def run_cases(
    cases: Sequence[Case],
    work: Callable[[Case], Result],
    lost: Callable[[Case, str], Result],
    *,
    workers: int,
    seconds: float,
) -> Iterator[tuple[Case, Result]]:
    """Yield each case with its result as it comes; of one whose worker died or took too long, what `lost` makes of it.

    Workers are forked, so what is imported before is there at once.
    """
    waiting, context = list(reversed(cases)), multiprocessing.get_context("fork")
    free: list[Worker] = [_started(context, work) for _ in range(min(workers, len(cases)))]
    busy: list[Worker] = []
    while waiting or busy:
        while waiting and free:
            worker = free.pop()
            if worker.done >= CASES_EACH:
                _end(worker)
                worker = _started(context, work)
            worker.case, worker.started = waiting.pop(), time.monotonic()
            worker.pipe.send(worker.case)
            busy.append(worker)
        wait([worker.pipe for worker in busy], timeout=1.0)
        for worker in list(busy):
            result: Result | None = None
            if worker.pipe.poll():
                try:
                    result = worker.pipe.recv()
                except (EOFError, ConnectionError):
                    worker.process.join()
                    result = lost(worker.case, f"the process ended with status {worker.process.exitcode}")
            elif time.monotonic() - worker.started > seconds:
                result = lost(worker.case, f"not done after {seconds:.0f} s")
                worker.process.kill()
            if result is None:
                continue
            busy.remove(worker)
            worker.done += 1
            yield worker.case, result
            if worker.process.is_alive():
                free.append(worker)
            else:
                worker.process.join()
                free.append(_started(context, work))
    for worker in free:
        _end(worker)


def _started(context: Any, work: Callable[[Any], Any]) -> Worker:
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, work), daemon=True)
    process.start()
    there.close()
    return Worker(process, here)


def _end(worker: Worker) -> None:
    worker.pipe.close()
    worker.process.join(5)
    if worker.process.is_alive():
        worker.process.kill()


def _serve(pipe: Connection, work: Callable[[Any], Any]) -> None:
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        pipe.send(work(case))
