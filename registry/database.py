"""Connections and transactions for any SQLAlchemy URL. Every failure is a RegistryError.

Writers take turns, so that none works on facts that another one is changing. A SQLite transaction that writes begins with
`BEGIN IMMEDIATE`. On other databases it first locks the only row of the schema's version table.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, CursorResult, Engine, create_engine, event, exc, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.pool import NullPool, StaticPool

from registry import notices
from registry.backups import advice
from registry.errors import (
    RegistryBusyError,
    RegistryDamagedError,
    RegistryError,
    RegistryFullError,
    RegistryReadOnlyError,
)
from registry.json_text import json_text, json_value
from registry.names import printable
from registry.reserve import is_full
from registry.schema import version_table
from registry.waiting import PAUSE_SECONDS, holder, pause

BUSY_SECONDS = 60.0
"""Time that a writer waits for another one."""

SILENT_SECONDS = 3.0
"""Time that it waits before it prints a note."""

SQLITE_SECONDS = 0.05
"""Time that SQLite itself waits at a try to take the lock."""

SERVER_SECONDS = 0.2
"""Time that PostgreSQL itself waits at a try: longer, because whoever leaves its queue goes to the end of it."""

_WRITES = "registry_writes"
_LOCK_NOT_AVAILABLE = "55P03"
"""PostgreSQL's error code for a lock that was not free within `lock_timeout`."""


class Database:
    """The database of a catalogue. `where` names it in errors, without a password; `path` is its file, if it has one.

    Threads may share it. Each has its own transaction.
    """

    def __init__(self, engine: Engine, where: str, path: Path | None, *, read_only: bool = False,
                 busy_timeout: float = BUSY_SECONDS) -> None:  # fmt: skip
        self.engine = engine
        self.where = where
        self.path = path
        self.read_only = read_only
        self._busy_timeout = busy_timeout
        self._thread = threading.local()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Yield a connection to read from: this thread's write transaction, else its read transaction, else a new one."""
        outer = self._connection or getattr(self._thread, "reader", None)
        if outer is not None:
            yield outer
            return
        with translated(self.where, self.path), self.engine.connect() as connection, connection.begin():
            self._thread.reader = connection
            try:
                yield connection
            finally:
                self._thread.reader = None

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Yield this thread's write transaction. It is committed when the outermost block ends, rolled back if that raises."""
        outer = self._connection
        if outer is not None:
            yield outer
            return
        if self.read_only:
            raise RegistryReadOnlyError(
                f"the registry {self.where} was opened for reading only; open it for writing to change it"
            )
        callbacks: list[Callable[[], None]] = []
        with translated(self.where, self.path), write_transaction(self.engine) as connection:
            self._connection, self._thread.callbacks = connection, callbacks
            try:
                self._stand_in_line(connection)
                yield connection
            finally:
                self._connection = None
        for callback in callbacks:
            callback()

    def after_commit(self, callback: Callable[[], None]) -> None:
        """Call `callback` after this thread's write transaction is committed; not at all if it is rolled back."""
        self._thread.callbacks.append(callback)

    def close(self) -> None:
        self.engine.dispose()

    def _stand_in_line(self, connection: Connection) -> None:
        """Lock the row that every writer locks. In SQLite the transaction already holds the write lock."""
        lock = select(version_table.c.version_num).with_for_update()
        if connection.dialect.name != "postgresql":
            connection.execute(lock)
            return

        def take() -> None:
            with connection.begin_nested():
                connection.execute(lock)

        _lock_timeout(connection, min(SERVER_SECONDS, self._busy_timeout))
        _take_in_turn(take, _is_locked, lambda: "another process", self.where, self._busy_timeout)
        _lock_timeout(connection, self._busy_timeout)

    @property
    def _connection(self) -> Connection | None:
        return getattr(self._thread, "connection", None)

    @_connection.setter
    def _connection(self, connection: Connection | None) -> None:
        self._thread.connection = connection


@contextmanager
def write_transaction(engine: Engine) -> Iterator[Connection]:
    """Begin a transaction that holds SQLite's write lock from its start."""
    with engine.connect() as connection:
        connection = connection.execution_options(**{_WRITES: True})
        with connection.begin():
            yield connection


def inserted_id(result: CursorResult[Any]) -> int:
    """Return the id of an inserted row."""
    key = result.inserted_primary_key
    assert key is not None
    return int(key[0])


def parse_url(text: str) -> URL:
    """Parse a SQLAlchemy URL.

    Raises RegistryError if `text` is not one.
    """
    try:
        return make_url(text)
    except exc.ArgumentError:
        raise RegistryError(
            f"'{printable(text.rpartition('@')[2])}' is not a database URL; write one in SQLAlchemy's form, "
            "such as 'sqlite:////folder/registry.db' for a file"
        ) from None


def file_url(path: Path) -> URL:
    """Return the URL of a SQLite file."""
    return URL.create("sqlite", database=str(path))


def immutable_url(path: Path) -> URL:
    """Return the URL of a SQLite file that cannot be written, in a folder where SQLite cannot make files either."""
    uri = path.absolute().as_uri()
    return URL.create("sqlite", database=uri, query={"mode": "ro", "immutable": "1", "uri": "true"})


def database_file(url: URL) -> Path | None:
    """Return the file of a SQLite URL; None for other databases, memory, and `file:` URIs."""
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        return None
    return None if url.database.startswith("file:") else Path(url.database)


def is_in_memory(url: URL) -> bool:
    """Whether the URL names a SQLite database in memory."""
    return url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:")


def shown_url(url: URL) -> str:
    """Return the database's name for messages: the path of its file, or its URL without a password."""
    path = database_file(url)
    return printable(str(path) if path is not None else url.render_as_string(hide_password=True), longest=400)


def make_engine(url: URL, *, read_only: bool, busy_timeout: float, exclusive: bool = False) -> Engine:
    """Return an engine that opens one connection per transaction.

    `busy_timeout`, in seconds, and `exclusive` apply to SQLite only. With `exclusive`, no other process may have the file
    open, and the index of its log is kept in memory.

    Raises RegistryError if the database's driver is unknown or not installed.
    """
    sqlite = url.get_backend_name() == "sqlite"
    try:
        engine = create_engine(
            url,
            poolclass=StaticPool if is_in_memory(url) else NullPool,
            connect_args={"timeout": busy_timeout} if sqlite else {},
            json_serializer=json_text,
            json_deserializer=json_value,
        )
    except ModuleNotFoundError as error:
        raise RegistryError(
            f"the registry {shown_url(url)} needs the Python package {error.name}; install it, for instance with pip"
        ) from None
    except (exc.ArgumentError, exc.NoSuchModuleError, TypeError, ValueError) as error:
        raise RegistryError(
            f"the registry URL {shown_url(url)} cannot be used ({_first_line(error)}); write it in SQLAlchemy's form"
        ) from None
    if sqlite:
        _set_up_sqlite(engine, url, busy_timeout, read_only=read_only, exclusive=exclusive)
    return engine


def _set_up_sqlite(engine: Engine, url: URL, busy_timeout: float, *, read_only: bool, exclusive: bool) -> None:
    @event.listens_for(engine, "connect")
    def connected(connection: sqlite3.Connection, record: object) -> None:
        connection.isolation_level = None  # `began` begins transactions, not the driver
        connection.execute("PRAGMA foreign_keys = ON")
        if exclusive:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        if read_only:
            connection.execute("PRAGMA query_only = ON")

    @event.listens_for(engine, "begin")
    def began(connection: Connection) -> None:
        if connection.get_execution_options().get(_WRITES):
            _begin_to_write(connection, shown_url(url), database_file(url), busy_timeout)
        else:
            connection.exec_driver_sql("BEGIN")


def _begin_to_write(connection: Connection, where: str, path: Path | None, busy_timeout: float) -> None:
    """Take SQLite's write lock."""
    connection.exec_driver_sql(f"PRAGMA busy_timeout = {int(min(SQLITE_SECONDS, busy_timeout) * 1000)}")
    _take_in_turn(
        lambda: connection.exec_driver_sql("BEGIN IMMEDIATE"),
        lambda error: primary_code(error.orig) == sqlite3.SQLITE_BUSY,
        lambda: holder(path),
        where,
        busy_timeout,
    )
    connection.exec_driver_sql(f"PRAGMA busy_timeout = {int(busy_timeout * 1000)}")


def _take_in_turn(
    take: Callable[[], object],
    is_taken: Callable[[exc.OperationalError], bool],
    whom: Callable[[], str],
    where: str,
    busy_timeout: float,
) -> None:
    """Take the write lock. After SILENT_SECONDS, print a note that names the process it waits for.

    The database itself waits only for moments: in its driver's code no signal is handled, and whoever waits may be asked to end.
    """
    began = time.monotonic()
    silent = min(SILENT_SECONDS, busy_timeout)
    said = False
    while True:
        try:
            take()
            return
        except exc.OperationalError as error:
            waited = time.monotonic() - began
            if waited >= busy_timeout or not is_taken(error):
                raise
        if waited >= silent and not said:
            notices.say(waiting_for(whom(), where, busy_timeout))
            said = True
        pause(min(PAUSE_SECONDS, busy_timeout - waited))


def _is_locked(error: exc.OperationalError) -> bool:
    """Whether PostgreSQL's lock was not free."""
    return getattr(error.orig, "sqlstate", None) == _LOCK_NOT_AVAILABLE


def _lock_timeout(connection: Connection, seconds: float) -> None:
    """Set the time for which PostgreSQL itself waits for a lock in this transaction."""
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = {max(1, int(seconds * 1000))}")


def waiting_for(whom: str, where: str, busy_timeout: float) -> str:
    """Return the note of a writer that waits for another one."""
    return f"waiting for {whom}, which is writing to the registry {where}, for {busy_timeout:.0f} seconds at most"


@contextmanager
def translated(where: str, path: Path | None = None) -> Iterator[None]:
    """Turn errors of the database and its driver into a RegistryError of one sentence that names `where`.

    `path` is the database's file, if it has one. It serves to tell a full disk from other failures.
    """
    try:
        yield
    except exc.DBAPIError as error:
        raise _as_registry_error(error.orig, where, path) from error
    except exc.StatementError as error:
        if isinstance(error.orig, RegistryError):  # a column type refused a value
            raise error.orig from None
        raise _as_registry_error(error.orig, where, path) from error
    except (sqlite3.Error, exc.SQLAlchemyError) as error:
        raise _as_registry_error(error, where, path) from error


def primary_code(error: BaseException | None) -> int | None:
    """Return SQLite's primary result code of a driver's error, without the extended bits."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else int(code) & 0xFF


def _as_registry_error(error: BaseException | None, where: str, path: Path | None) -> RegistryError:
    code = primary_code(error)
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and path is not None and is_full(path.parent):
        code = sqlite3.SQLITE_FULL  # SQLite calls a file that cannot grow an input/output error
    if code == sqlite3.SQLITE_CANTOPEN and path is not None and _is_read_only(path):
        code = sqlite3.SQLITE_READONLY  # SQLite cannot make its own files beside the database
    match code:
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return _busy(holder(path), where)
        case sqlite3.SQLITE_READONLY:
            return RegistryReadOnlyError(
                f"the registry {where} cannot be written; give yourself write permission on the file and its folder, "
                "or set LORATOOL_HOME to a folder of your own"
            )
        case sqlite3.SQLITE_NOTADB:
            return RegistryDamagedError(
                f"the registry {where} is not a database; {advice(path)}, or set LORATOOL_HOME to another folder"
            )
        case sqlite3.SQLITE_CORRUPT:
            return RegistryDamagedError(
                f"the registry {where} is damaged ({_first_line(error)}); {advice(path)}, "
                "or rescue its rows with SQLite's own '.recover'"
            )
        case sqlite3.SQLITE_FULL:
            return RegistryFullError(
                f"the disk of the registry {where} is full; nothing was changed: free some space and try again"
            )
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM | sqlite3.SQLITE_AUTH:
            return RegistryError(
                f"the registry {where} cannot be opened; check that its folder exists and that you "
                "may read and write it"
            )
        case sqlite3.SQLITE_IOERR:
            return RegistryError(
                f"the disk of the registry {where} failed ({_first_line(error)}); check its health, then try again"
            )
        case sqlite3.SQLITE_CONSTRAINT:
            return RegistryError(
                f"the registry {where} refused an entry ({_first_line(error)}); run 'loratool doctor' and try again"
            )
        case _:
            if getattr(error, "sqlstate", None) == _LOCK_NOT_AVAILABLE:
                return _busy("another process", where)
            return RegistryError(
                f"the registry {where} failed ({_first_line(error)}); check the database and its URL, then try again"
            )


def _is_read_only(path: Path) -> bool:
    """Whether the file can be read, and either it or its folder cannot be written."""
    may = partial(os.access, effective_ids=True)
    return may(path, os.R_OK) and not (may(path, os.W_OK) and may(path.parent, os.W_OK))


def _busy(whom: str, where: str) -> RegistryBusyError:
    return RegistryBusyError(f"the registry {where} is busy: {whom} is writing to it; try again when it is done")


def _first_line(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines()
    return printable(lines[0]) if lines else type(error).__name__
