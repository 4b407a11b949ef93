"""Backups are made by themselves, seldom, whole, and never of nothing; a damaged catalogue says how to put one back."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest
from catalogued import facts

from registry import Registry, RegistryDamagedError
from registry.backups import EVERY_SECONDS, KEPT, backups, folder_of, put_back
from registry.places import DATABASE_NAME


def add(home: Path, name: str) -> None:
    with Registry.open(home) as registry:
        registry.adapters.add(name, facts(name))


def a_day_passes(home: Path) -> None:
    """Every backup is a day older, and called so."""
    for backup in reversed(backups(home / DATABASE_NAME)):
        moment = backup.made_at.timestamp() - EVERY_SECONDS - 1
        stamp = time.strftime("%Y-%m-%dT%H%M%SZ", time.gmtime(moment))
        os.utime(backup.path.rename(backup.path.with_name(f"{stamp}.db")), (moment, moment))


def test_a_catalogue_is_backed_up_before_the_first_change_of_a_day(home: Path) -> None:
    database = home / DATABASE_NAME
    add(home, "pirate")
    assert backups(database) == ()  # there was nothing yet
    add(home, "parrot")
    add(home, "third")
    (backup,) = backups(database)
    assert backup.versions == 1
    assert [path.name for path in folder_of(database).iterdir()] == [backup.path.name]
    a_day_passes(home)
    with Registry.open(home, read_only=True):
        assert len(backups(database)) == 1
    add(home, "fourth")
    assert [each.versions for each in backups(database)] == [3, 1]


def test_the_last_few_backups_are_kept_and_the_largest(home: Path) -> None:
    with Registry.open(home) as registry:
        for number in range(300):
            registry.adapters.add(f"many-{number}", facts(str(number)))
    with Registry.open(home):
        pass
    (largest,) = backups(home / DATABASE_NAME)
    for file in home.glob(f"{DATABASE_NAME}*"):
        file.unlink()
    for number in range(KEPT + 3):
        add(home, f"new-{number}")
        a_day_passes(home)
    kept = backups(home / DATABASE_NAME)
    assert len(kept) == KEPT + 1
    assert kept[-1].versions == largest.versions == 300


def test_a_backup_is_put_back_by_the_command_that_is_given(home: Path) -> None:
    database = home / DATABASE_NAME
    for name in ("pirate", "parrot"):
        add(home, name)
    database.write_bytes(b"no database " * 1000)
    (backup,) = backups(database)
    with pytest.raises(RegistryDamagedError) as raised:
        Registry.open(home)
    assert put_back(database, backup.path) in str(raised.value)
    subprocess.run(put_back(database, backup.path), shell=True, check=True)
    with Registry.open(home) as registry:
        assert [adapter.name for adapter in registry.adapters.list()] == ["pirate"]
    assert (home / f"{DATABASE_NAME}.old").read_bytes().startswith(b"no database")


def test_a_damaged_catalogue_is_not_backed_up(home: Path) -> None:
    add(home, "pirate")
    file = home / DATABASE_NAME
    with sqlite3.connect(file) as connection:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
    size = file.stat().st_size // pages
    with file.open("r+b") as database:
        for page in range(2, pages):
            database.seek(page * size)
            database.write(b"\xff" * 64)
    with pytest.raises(RegistryDamagedError), Registry.open(home) as registry:
        registry.adapters.find("pirate")
    assert backups(file) == ()


def test_a_catalogue_elsewhere_has_its_backups_beside_it(home: Path, tmp_path: Path) -> None:
    for name in ("pirate", "parrot"):
        with Registry.open(home, f"sqlite:///{tmp_path / 'team.db'}") as registry:
            registry.adapters.add(name, facts(name))
            found = registry.backups()
    assert [backup.path.parent for backup in found] == [tmp_path / "team.backups"]
