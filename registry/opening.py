"""Opening the database. An older schema is upgraded; a database that cannot be written can still be read."""

from __future__ import annotations

import errno
import sqlite3
import stat
import time
from contextlib import closing, suppress
from pathlib import Path

from sqlalchemy import Engine, exc, select
from sqlalchemy.engine import URL

from registry import database as db
from registry import notices
from registry.database import Database
from registry.errors import RegistryError, RegistryFullError, RegistryReadOnlyError
from registry.names import printable
from registry.schema import upgrade, version_table
from registry.tables import metadata
from registry.version import HEAD
from registry.waiting import holder

_KIND_OF_ERROR: dict[int, type[RegistryError]] = {
    errno.EACCES: RegistryReadOnlyError,
    errno.EPERM: RegistryReadOnlyError,
    errno.EROFS: RegistryReadOnlyError,
    errno.ENOSPC: RegistryFullError,
    errno.EDQUOT: RegistryFullError,
}


def open_database(url: URL, *, read_only: bool, busy_timeout: float) -> Database:
    """Open the database at `url` and upgrade its schema.

    Raises RegistryError: not a database, cannot be read or written, written by a newer loratool, busy, full disk.
    """
    where, path = db.shown_url(url), db.database_file(url)
    if path is not None:
        refuse_misplaced(path)
    if read_only and (db.is_in_memory(url) or (path is not None and not path.exists())):
        return empty_database(where)
    engine = db.make_engine(url, read_only=read_only, busy_timeout=busy_timeout)
    with db.translated(where, path):
        try:
            current = _version(engine)
        except exc.DBAPIError as error:
            if not read_only or path is None or not _needs_no_writing(error):
                raise
            engine = _engine_that_writes_nothing(url, path, busy_timeout)
            current = _version(engine)
        if current != HEAD:
            changing = db.make_engine(url, read_only=False, busy_timeout=busy_timeout) if read_only else engine
            if path is not None:
                _use_write_ahead_log(changing, path, busy_timeout)
            _upgrade(changing, where)
    return Database(engine, where, path, read_only=read_only, busy_timeout=busy_timeout)


def refuse_misplaced(path: Path) -> None:
    """Raise RegistryError if the database's file is no file, or one of the folders above it is one."""
    what = _what_is_no_file(path)
    if what:
        raise RegistryError(
            f"'{printable(str(path), 400)}' should be the registry's file, but is {what}; move it away, or set "
            "LORATOOL_HOME to another folder"
        )
    nearest = next((place for place in path.parents if place.exists()), path.parent)
    if nearest.exists() and not nearest.is_dir():
        raise RegistryError(
            f"the registry's folder '{printable(str(path.parent), 400)}' cannot be made, because "
            f"'{printable(str(nearest), 400)}' is a file; set LORATOOL_HOME to a folder"
        )


def make_home(home: Path) -> None:
    """Make the folder if it is missing.

    Raises RegistryError if it cannot be made.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        shown = printable(str(home), 400)
        raise _KIND_OF_ERROR.get(error.errno or 0, RegistryError)(
            f"the folder '{shown}' for the registry cannot be made ({error.strerror}); "
            "set LORATOOL_HOME to a folder that you may write to"
        ) from None


def empty_database(where: str) -> Database:
    """Return an empty catalogue in memory, for reading before one has been made."""
    engine = db.make_engine(URL.create("sqlite"), read_only=False, busy_timeout=0)
    metadata.create_all(engine)
    return Database(engine, where, None, read_only=True)


def _version(engine: Engine) -> str | None:
    """Return the schema's revision with one query; None if its table does not exist."""
    try:
        with engine.connect() as connection:
            return connection.execute(select(version_table.c.version_num)).scalar()
    except exc.ProgrammingError:
        return None
    except exc.OperationalError as error:
        if db.primary_code(error.orig) not in (None, sqlite3.SQLITE_ERROR):
            raise
        return None


def _needs_no_writing(error: exc.DBAPIError) -> bool:
    """Whether SQLite failed to make its own files beside the database, for lack of permission or space."""
    return db.primary_code(error.orig) in (
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
    )


def _engine_that_writes_nothing(url: URL, path: Path, busy_timeout: float) -> Engine:
    """Return an engine that reads a file without making files beside it.

    If the write-ahead log holds commits, its index is kept in memory, so that no other process may have the file open.
    """
    if _has_log(path):
        return db.make_engine(url, read_only=True, busy_timeout=busy_timeout, exclusive=True)
    return db.make_engine(db.immutable_url(path), read_only=True, busy_timeout=busy_timeout)


def _has_log(path: Path) -> bool:
    """Whether the write-ahead log beside the file holds commits that the file alone lacks."""
    with suppress(FileNotFoundError):
        return path.with_name(f"{path.name}-wal").stat().st_size > 0
    return False


def _upgrade(engine: Engine, where: str) -> None:
    try:
        with db.write_transaction(engine) as connection:
            upgrade(connection, where)
    except exc.DBAPIError:
        if _version(engine) != HEAD:  # otherwise another process made the same upgrade at the same time
            raise


def _use_write_ahead_log(engine: Engine, path: Path, busy_timeout: float) -> None:
    """Turn on SQLite's write-ahead log, with which readers and a writer never wait for each other. The file stores the mode.

    SQLite ignores its busy timeout for this statement, so it is retried here.
    """
    started = time.monotonic()
    is_silent = True
    while True:
        try:
            with closing(engine.raw_connection()) as connection:
                connection.cursor().execute("PRAGMA journal_mode = WAL")
                return
        except (exc.OperationalError, sqlite3.OperationalError) as error:
            waited = time.monotonic() - started
            if db.primary_code(getattr(error, "orig", error)) != sqlite3.SQLITE_BUSY or waited > busy_timeout:
                raise
        if is_silent and waited > db.SILENT_SECONDS:
            notices.say(db.waiting_for(holder(path), str(path), busy_timeout))
            is_silent = False
        time.sleep(0.02)


def _what_is_no_file(path: Path) -> str:
    """Return what is at `path` instead of a file; empty where it is a file, or nothing."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return "a circle of links" if error.errno == errno.ELOOP else ""
    if stat.S_ISREG(mode):
        return ""
    return "a folder" if stat.S_ISDIR(mode) else "a device, a pipe or a socket"
