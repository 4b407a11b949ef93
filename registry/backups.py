"""Automatic backups of a catalogue in a SQLite file: one a day, before the day's first change.

They are beside the file, in `registry.backups/` for `registry.db`. SQLite's own backup makes them, so that they are consistent
even while another process writes.
"""

from __future__ import annotations

import shlex
import sqlite3
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from registry.places import DATABASE_NAME
from registry.plain_file import is_plain
from registry.reserve import RESERVE_BYTES, free_bytes

KEPT = 5
"""Number of newest backups to keep. The largest is kept too, in case a lost catalogue has been growing anew for days."""

EVERY_SECONDS = 24 * 3600.0

_STAMP = "%Y-%m-%dT%H%M%SZ"
"""The name of a backup without `.db`: the time at which it was made."""

_PAGES = 1000
"""Pages to copy at once. A writer waits at most for these."""


@dataclass(frozen=True, slots=True)
class Backup:
    """A backup: its file, its time, and its number of versions of adapters, which is None if it cannot be read."""

    path: Path
    made_at: datetime
    versions: int | None


def folder_of(database: Path) -> Path:
    """Return the folder of the backups of a SQLite file."""
    return database.with_suffix(".backups")


def backups(database: Path) -> tuple[Backup, ...]:
    """Return the backups of a SQLite file, newest first."""
    return tuple(
        Backup(path, made_at, _versions(path)) for path in _files(database) if (made_at := _stamp(path)) is not None
    )


def put_back(database: Path, backup: Path) -> str:
    """Return the shell command that restores a backup. It keeps the present file as `registry.db.old`."""
    file, copy = str(database), str(backup)
    if not (file + copy).isprintable():  # nobody could paste it
        file, copy = database.name, str(Path(backup.parent.name, backup.name))
        return (
            f"{_moved_away(shlex.quote(file))}; cp {shlex.quote(copy)} {shlex.quote(file)}  # in the registry's folder"
        )
    return f"{_moved_away(shlex.quote(file))}; cp {shlex.quote(copy)} {shlex.quote(file)}"


def advice(database: Path | None) -> str:
    """Return the next steps for a user with a damaged database, and what each of them keeps."""
    if database is None:
        return "restore a backup of it"
    can_be_shown = str(database.absolute()).isprintable()
    file = shlex.quote(str(database) if can_be_shown else database.name)
    other = f"sqlite:///{database.absolute()}" if can_be_shown else "URL"
    named = "" if database.name == DATABASE_NAME else f"--registry {shlex.quote(other)} "
    ending = "" if can_be_shown else "  # in the registry's folder"
    again = f"{_moved_away(file)}; loratool {named}doctor --rebuild{ending}"
    rebuild = (
        f"make it again from the store with '{again}', which restores every adapter with a label there, but no merges"
    )
    newest = next(iter(backups(database)), None)
    if newest is None:
        # A file of another name may be anything that --registry names by mistake; it is not to be moved.
        return rebuild if database.name == DATABASE_NAME else "restore a backup of it, or give another file"
    held = "an unknown number of" if newest.versions is None else f"{newest.versions:,}"
    versions = "adapter version" if newest.versions == 1 else "adapter versions"
    return (
        f"restore its newest backup with '{put_back(database, newest.path)}', which keeps what the catalogue had at "
        f"{newest.made_at:%Y-%m-%d %H:%M} UTC ({held} {versions}, with their merges), or {rebuild}"
    )


def _moved_away(file: str) -> str:
    """Return the shell command that moves a database away, without the log that belongs to it."""
    return f"mv {file} {file}.old; rm -f {file}-wal {file}-shm"


def keep(database: Path) -> bool:
    """Make today's backup, and return whether it was made.

    None is made if there is one already, or if the database is empty or cannot be read, or the disk is nearly full.
    """
    try:
        files = _files(database)
        newest = _stamp(files[0]) if files else None
        if (newest is not None and time.time() - newest.timestamp() < EVERY_SECONDS) or not database.is_file():
            return False
        free = free_bytes(database.parent)
        if free is not None and free < 2 * database.stat().st_size + RESERVE_BYTES:
            return False
        made = _make(database)
    except (OSError, sqlite3.Error):
        return False  # opening the database will report the error
    if made:
        _thin_out(database)
    return made


def _make(database: Path) -> bool:
    with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=rw", uri=True, timeout=1.0)) as source:
        source.execute("PRAGMA query_only = ON")
        filled = "SELECT EXISTS (SELECT 1 FROM adapters) OR EXISTS (SELECT 1 FROM bases)"
        if not source.execute(filled).fetchone()[0]:
            return False
        folder = folder_of(database)
        folder.mkdir(exist_ok=True)
        stamp = datetime.now(UTC).strftime(_STAMP)
        draft, target = folder / f".{stamp}.tmp", folder / f"{stamp}.db"
        try:
            with closing(sqlite3.connect(draft)) as copy:
                source.backup(copy, pages=_PAGES)
                copy.execute("PRAGMA journal_mode = DELETE")
                sound = bool(copy.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok")
            if sound:
                draft.rename(target)
            return sound
        finally:
            for left in folder.glob(f"{draft.name}*"):
                left.unlink()


def _thin_out(database: Path) -> None:
    files = _files(database)
    largest = max(files, key=lambda path: path.stat().st_size)
    for path in files[KEPT:]:
        if path != largest:
            with suppress(OSError):
                path.unlink()


def _files(database: Path) -> list[Path]:
    try:
        found = (path for path in folder_of(database).iterdir() if _stamp(path) is not None and is_plain(path))
        return sorted(found, reverse=True)
    except OSError:
        return []


def _stamp(path: Path) -> datetime | None:
    """Return when a backup was made, by its name, as a copied folder has other times; None if it is no backup's name."""
    try:
        return datetime.strptime(path.name, f"{_STAMP}.db").replace(tzinfo=UTC)
    except ValueError:
        return None


def _versions(path: Path) -> int | None:
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            return int(connection.execute("SELECT COUNT(*) FROM adapters").fetchone()[0])
    except sqlite3.Error:
        return None
