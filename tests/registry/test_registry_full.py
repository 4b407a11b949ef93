"""A disk that is full under the catalogue: what reads works, what frees space works, and what cannot be done says why."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from catalogued import facts
from disks import fill, small_disk
from sqlalchemy import event

from registry import Registry, RegistryFullError, list_adapters, reserve
from registry.places import DATABASE_NAME

FILES = {"adapter_model.safetensors": b"w" * 50_000, "adapter_config.json": b"{}"}


@pytest.fixture
def full_home(tmp_path: Path) -> Iterator[Path]:
    """A home with two adapters on a disk that has become full."""
    with small_disk(tmp_path / "disk") as disk:
        with Registry.open(disk / "home") as registry:
            for name in ("pirate", "parrot"):
                with registry.store.stage({**FILES, "name": name.encode()}) as staged:
                    registry.adapters.add(name, facts(name), staged=staged)
        fill(disk)
        yield disk / "home"


def test_what_only_reads_works_on_a_full_disk(full_home: Path) -> None:
    assert [adapter.name for adapter in list_adapters(full_home)] == ["parrot", "pirate"]
    with Registry.open(full_home, read_only=True) as registry:
        record = registry.adapters.find("pirate")
        assert (registry.adapters.files(record) / "name").read_bytes() == b"pirate"
        assert registry.doctor.examine(deep=True) == ()


def test_commits_that_stand_in_the_log_are_read_on_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        home = disk / "home"
        Registry.open(home).close()
        with closing(sqlite3.connect(home / DATABASE_NAME)) as other:  # as long as it is open, the log is kept
            other.execute("SELECT * FROM adapters").fetchall()
            with Registry.open(home) as registry:
                registry.adapters.add("pirate", facts())
            log = (home / f"{DATABASE_NAME}-wal").read_bytes()
            database = (home / DATABASE_NAME).read_bytes()
        # What a killed process leaves: the log, and no index of it.
        (home / DATABASE_NAME).write_bytes(database)
        (home / f"{DATABASE_NAME}-wal").write_bytes(log)
        fill(disk)
        assert [adapter.name for adapter in list_adapters(home)] == ["pirate"]
        with Registry.open(home, read_only=True) as registry:
            assert registry.adapters.find("pirate").version == 1


def test_what_frees_space_works_on_a_full_disk(full_home: Path) -> None:
    for name in ("pirate", "parrot"):
        with Registry.open(full_home) as registry:
            registry.adapters.remove(name, now=name == "pirate")
        (full_home.parent / "filling").unlink()
        fill(full_home.parent)
    with Registry.open(full_home) as registry:
        registry.doctor.collect(trash_days=0)
        assert list(registry.store.entries()) == []
    assert list_adapters(full_home) == ()


def test_what_needs_space_says_that_the_disk_is_full_and_changes_nothing(full_home: Path) -> None:
    with pytest.raises(RegistryFullError, match="is full"), Registry.open(full_home) as registry:
        registry.store.put({"adapter_model.safetensors": b"x" * 2_000_000})
    with (
        pytest.raises(RegistryFullError, match="is full"),
        Registry.open(full_home) as registry,
        registry.writing(),
    ):
        for number in range(100):
            registry.adapters.add("large", facts(str(number), config={"text": "x" * 50_000}))
    assert [adapter.name for adapter in list_adapters(full_home)] == ["parrot", "pirate"]
    with Registry.open(full_home) as registry:  # and the reserve is there again
        assert registry.adapters.tag("pirate", "speech").tags == ("speech",)


def test_the_reserve_is_given_up_on_a_full_disk_alone_and_made_again_when_there_is_room(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Registry.open(home).close()
    file = home / reserve.RESERVE_NAME
    assert file.stat().st_blocks * 512 >= reserve.RESERVE_BYTES
    with Registry.open(home):
        assert file.exists()
    monkeypatch.setattr(reserve, "free_bytes", lambda folder: 4096)
    with Registry.open(home):
        assert not file.exists()
    assert not file.exists()
    monkeypatch.undo()
    Registry.open(home).close()
    assert file.exists()


@pytest.mark.parametrize("code", [sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_CANTOPEN])
def test_a_full_disk_is_called_full_whatever_sqlite_calls_it(
    home: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Registry.open(home) as registry:

        @event.listens_for(registry.database.engine, "begin")
        def fail(connection: object) -> None:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = code
            raise error

        monkeypatch.setattr(reserve, "free_bytes", lambda folder: 0)
        with pytest.raises(RegistryFullError, match="full"):
            registry.adapters.add("pirate", facts())


def test_a_store_whose_disk_is_full_is_called_full(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Registry.open(home) as registry:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(RegistryFullError, match="is full"):
            registry.store.put(FILES)
