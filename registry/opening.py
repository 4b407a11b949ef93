"""Opening the database: brings an older one up to date, and reads one all the same that cannot be written."""

from __future__ import annotations

import errno
import sqlite3
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
    """The database at `url`, its schema brought up to date.

    Raises RegistryError: not a database, cannot be read or written, of a newer loratool, busy, full disk.
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
    """Raises RegistryError where a folder is in the place of the file, or a file in that of a folder above it."""
    if path.is_dir():
        raise RegistryError(
            f"'{printable(str(path), 400)}' is a folder, in the place of the registry's file; move it away, or set "
            "LORATOOL_HOME to another folder"
        )
    nearest = next((place for place in path.parents if place.exists()), path.parent)
    if nearest.exists() and not nearest.is_dir():
        raise RegistryError(
            f"the registry's folder '{printable(str(path.parent), 400)}' cannot be: '{printable(str(nearest), 400)}' is a "
            "file; set LORATOOL_HOME to a folder"
        )


def make_home(home: Path) -> None:
    """Raises RegistryError where the folder is missing and cannot be made."""
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        shown = printable(str(home), 400)
        raise _KIND_OF_ERROR.get(error.errno or 0, RegistryError)(
            f"the folder '{shown}' for the registry cannot be made ({error.strerror}); "
            "set LORATOOL_HOME to a folder that you may write to"
        ) from None


def empty_database(where: str) -> Database:
    """A catalogue with nothing in it, in memory: what there is to read where none was made yet."""
    engine = db.make_engine(URL.create("sqlite"), read_only=False, busy_timeout=0)
    metadata.create_all(engine)
    return Database(engine, where, None, read_only=True)


def _version(engine: Engine) -> str | None:
    """The schema's revision by one query; None where the query fails because there is no such table."""
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
    """Whether it is SQLite's own files beside the database that cannot be made: no permission, or the disk is full."""
    return db.primary_code(error.orig) in (
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
    )


def _engine_that_writes_nothing(url: URL, path: Path, busy_timeout: float) -> Engine:
    """For reading a file beside which nothing can be made.

    Without a log the file is all there is. Commits that stand in a log are read with its index in memory, for which nobody
    else may have the file open.
    """
    if _has_log(path):
        return db.make_engine(url, read_only=True, busy_timeout=busy_timeout, exclusive=True)
    return db.make_engine(db.immutable_url(path), read_only=True, busy_timeout=busy_timeout)


def _has_log(path: Path) -> bool:
    """Whether commits stand in a log beside the file, which a reader of the file alone would miss."""
    with suppress(FileNotFoundError):
        return path.with_name(f"{path.name}-wal").stat().st_size > 0
    return False


def _upgrade(engine: Engine, where: str) -> None:
    try:
        with db.write_transaction(engine) as connection:
            upgrade(connection, where)
    except exc.DBAPIError:
        if _version(engine) != HEAD:  # else another process made the same upgrade at the same time
            raise


def _use_write_ahead_log(engine: Engine, path: Path, busy_timeout: float) -> None:
    """SQLite's write-ahead log, under which readers and one writer never wait for each other. The file remembers it.

    SQLite does not wait for its busy timeout here, so this does.
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
