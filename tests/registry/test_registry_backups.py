"""Backups are made by themselves, seldom, whole, and never of nothing; a damaged catalogue says how to put one back."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from catalogued import facts
from test_registry_rebuild import add as catalogued

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


def test_a_damaged_catalogue_is_made_again_from_its_store_by_the_command_that_is_given(home: Path) -> None:
    """The only backup is from before the second adapter, and the store has both."""
    database = home / DATABASE_NAME
    for name in ("pirate", "parrot"):
        with Registry.open(home) as registry:
            catalogued(registry, name)
    for damage in (b"no database " * 1000, database.read_bytes()[:4096] + b"\xff" * 40_000):
        database.write_bytes(damage)
        with pytest.raises(RegistryDamagedError) as raised, Registry.open(home) as registry:
            registry.adapters.find("pirate")
        message = str(raised.value)
        made = backups(database)[0].made_at
        assert f"{made:%Y-%m-%d %H:%M} UTC (1 adapter version, with their merges)" in message
        (way,) = re.findall(r"make it again from the store with '(.*?--rebuild)'", message)
        loratool = f"{sys.executable} -m loratool"
        environment = {**os.environ, "LORATOOL_HOME": str(home)}
        subprocess.run(way.replace("loratool doctor", f"{loratool} doctor"), shell=True, env=environment, check=True)
        with Registry.open(home) as registry:
            assert [adapter.name for adapter in registry.adapters.list()] == ["parrot", "pirate"]


def test_a_damaged_catalogue_without_a_backup_is_told_of_its_store(home: Path) -> None:
    add(home, "pirate")
    (home / DATABASE_NAME).write_bytes(b"no database " * 1000)
    with pytest.raises(RegistryDamagedError, match="doctor --rebuild") as raised:
        Registry.open(home)
    assert "backup" not in str(raised.value)


def test_the_time_of_a_backup_is_in_its_name_and_survives_a_copy(home: Path) -> None:
    for name in ("pirate", "parrot"):
        add(home, name)
    a_day_passes(home)
    (before,) = backups(home / DATABASE_NAME)
    os.utime(before.path)  # as a copy of the home has it
    assert backups(home / DATABASE_NAME) == (before,)
    add(home, "third")
    assert len(backups(home / DATABASE_NAME)) == 2  # a day has passed since the first, whatever its file says


def test_what_is_no_backup_is_not_called_one(home: Path) -> None:
    for name in ("pirate", "parrot"):
        add(home, name)
    (backup,) = backups(home / DATABASE_NAME)
    folder = backup.path.parent
    os.mkfifo(folder / "2999-01-01T000000Z.db")
    (folder / "2998-01-01T000000Z.db").symlink_to(backup.path)
    (folder / "mine.db").write_bytes(b"")
    assert backups(home / DATABASE_NAME) == (backup,)


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
