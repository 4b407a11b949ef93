"""What the processes do that `test_registry_processes` starts."""

from __future__ import annotations

import signal
import sqlite3
from contextlib import closing
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

from catalogued import facts

from registry import Registry
from registry.places import DATABASE_NAME
from registry.store import Store

ROUNDS = 8
FILES = {"adapter_model.safetensors": b"w" * 100_000, "adapter_config.json": b"{}"}


def add_versions(home: Path, number: int, barrier: Barrier) -> None:
    barrier.wait()
    with Registry.open(home, busy_timeout=60) as registry:
        for turn in range(ROUNDS):
            registry.adapters.add("pirate", facts(f"{number}.{turn}"), tags=[f"process{number}"])


def add_the_same(home: Path, number: int, barrier: Barrier) -> None:
    with Registry.open(home, busy_timeout=60) as registry:
        for turn in range(ROUNDS):
            barrier.wait()
            with registry.store.stage({**FILES, "turn": str(turn).encode()}) as staged:
                registry.adapters.add("pirate", facts(str(turn)), staged=staged)


def put_the_same(home: Path, number: int, barrier: Barrier) -> None:
    store = Store(home / "store")
    for turn in range(ROUNDS):
        barrier.wait()
        key = store.put({**FILES, "turn": str(turn).encode()})
        assert store.is_whole(key)


def add_remove_collect(home: Path, number: int, barrier: Barrier) -> None:
    """All add, drop and collect the same content, each under names of its own."""
    barrier.wait()
    with Registry.open(home, busy_timeout=60) as registry:
        for turn in range(ROUNDS):
            with registry.store.stage(FILES) as staged:
                record, _ = registry.adapters.add(f"pirate-{number}-{turn}", facts(), staged=staged)
            assert (registry.adapters.files(record) / "adapter_model.safetensors").stat().st_size == 100_000
            if turn < ROUNDS - 1:
                registry.adapters.remove(record.reference, now=bool(turn % 2))
            registry.doctor.collect(trash_days=0)


def stop_inside_a_transaction(home: Path, ready: Event) -> None:
    with Registry.open(home) as registry:
        registry.adapters.add("kept", facts())
        with registry.writing(), registry.store.stage(FILES) as staged:
            registry.adapters.remove("kept")
            for number in range(200):
                registry.adapters.add("half", facts(str(number), config={"text": "x" * 10_000}))
            registry.adapters.add("filed", facts("filed"), staged=staged)
            ready.set()
            signal.pause()


def stop_while_staging(home: Path, ready: Event) -> None:
    with Registry.open(home) as registry:
        registry.adapters.add("kept", facts())
        registry.store.stage(FILES)
        ready.set()
        signal.pause()


def hold_the_lock(place: Path, ready: Event, done: Event) -> None:
    """Hold the write lock of a SQLite file, or of the catalogue in a home, until it is `done`."""
    file = place / DATABASE_NAME if place.is_dir() else place
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        ready.set()
        assert done.wait(60)
        connection.execute("ROLLBACK")
