"""Several processes at once, and processes that are killed: nothing is lost, nothing is there twice."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from catalogue_workers import (
    ROUNDS,
    add_remove_collect,
    add_the_same,
    add_versions,
    put_the_same,
    stop_inside_a_transaction,
    stop_while_staging,
)
from catalogued import facts

from registry import Registry

SPAWN = multiprocessing.get_context("spawn")
PROCESSES = 3


def together(target: Callable[..., None], home: Path, processes: int = PROCESSES) -> None:
    """Runs `target(home, number, barrier)` in several new processes; all must end well."""
    barrier = SPAWN.Barrier(processes)
    running = [SPAWN.Process(target=target, args=(home, number, barrier)) for number in range(processes)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0] * processes


def test_processes_that_make_the_catalogue_and_add_to_one_name_at_once_all_succeed(home: Path) -> None:
    together(add_versions, home)
    with Registry.open(home) as registry:
        versions = registry.adapters.versions("pirate")
    assert [record.version for record in versions] == list(range(1, PROCESSES * ROUNDS + 1))
    assert len({record.sha256 for record in versions}) == PROCESSES * ROUNDS
    assert all(len(record.tags) == 1 for record in versions)


def test_processes_that_add_the_same_adapter_at_once_make_one_version_and_one_copy(home: Path) -> None:
    together(add_the_same, home)
    with Registry.open(home) as registry:
        assert registry.counts().versions == ROUNDS
        assert len(list(registry.store.entries())) == ROUNDS
        assert registry.doctor.examine(deep=True) == ()


def test_processes_that_put_the_same_files_at_once_all_succeed_with_one_copy(home: Path) -> None:
    together(put_the_same, home)
    with Registry.open(home) as registry:
        assert len(list(registry.store.entries())) == ROUNDS
        assert list((home / "store" / "tmp").iterdir()) == []


def test_collecting_garbage_never_takes_what_another_process_adds(home: Path) -> None:
    Registry.open(home).close()
    together(add_remove_collect, home)
    with Registry.open(home) as registry:
        assert registry.counts().versions == PROCESSES
        assert registry.doctor.examine(deep=True) == ()
        assert len(list(registry.store.entries())) == 1


@pytest.mark.parametrize("target", [stop_inside_a_transaction, stop_while_staging])
def test_a_process_killed_at_work_loses_nothing_and_leaves_nothing(home: Path, target: Any) -> None:
    ready = SPAWN.Event()
    process = SPAWN.Process(target=target, args=(home, ready))
    process.start()
    assert ready.wait(60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    with Registry.open(home) as registry:
        assert [adapter.reference for adapter in registry.adapters.list()] == ["kept@1"]
        registry.adapters.add("next", facts("next"))
        registry.doctor.collect(sure=True)
        assert list(registry.store.entries()) == []
