"""Whole processes, timed from outside by the operating system's own accounting."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Run:
    """One finished process: seconds of wall clock and of processor time, and its peak memory in bytes."""

    wall: float
    cpu: float
    peak: int


def run(command: Sequence[str], env: Mapping[str, str] | None = None) -> Run:
    """Run a command to its end, its output kept back unless it fails; exits with its output when it does.

    Python keeps the bytecode that it compiles, whatever it is told here: an installer compiles all, and a checkout has it
    after the first run.
    """
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=kept if env is None else {**kept, **env}
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{output.decode(errors='replace')}")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


Contestant = tuple[Callable[[], None], Callable[[], Run]]
"""What prepares a run, untimed, and the run."""


REST_SECONDS = 8.0
"""Memory that a contestant frees is given back to the host of a virtual machine within seconds, and until then whoever
comes next finds it quicker than any other memory. After this rest all contestants find the same."""


def settle(inputs: Iterable[Path]) -> None:
    """Rest, then read the files that a contestant reads, so that they are in the page cache for each."""
    time.sleep(REST_SECONDS)
    for file in inputs:
        with open(file, "rb", buffering=0) as stream:
            while stream.read(1 << 22):
                pass


def in_turn(contestants: Mapping[str, Contestant], rounds: int, inputs: Sequence[Path] = ()) -> dict[str, list[Run]]:
    """Run the contestants A B C, A B C, ...: once to warm up, then `rounds` times that count.

    Before each, what it needs is prepared, the machine rests and the `inputs` are read once.
    """
    runs: dict[str, list[Run]] = {name: [] for name in contestants}
    for counted in range(rounds + 1):
        for name, (prepare, go) in contestants.items():
            prepare()
            if inputs:
                settle(inputs)
            finished = go()
            print(
                f"  {'warm-up' if not counted else f'round {counted}'}  {name:24s} {finished.wall:7.2f} s", flush=True
            )
            if counted:
                runs[name].append(finished)
    return runs


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def wall(runs: Sequence[Run]) -> float:
    """Median of the wall-clock seconds."""
    return median([finished.wall for finished in runs])


def spread(runs: Sequence[Run]) -> str:
    """Least to most wall-clock seconds."""
    return f"{min(r.wall for r in runs):.2f} to {max(r.wall for r in runs):.2f}"


def peak(runs: Sequence[Run]) -> float:
    """Largest peak memory, MiB."""
    return max(finished.peak for finished in runs) / 2**20
