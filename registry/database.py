"""Connections and transactions: any SQLAlchemy URL, one transaction a command, every failure a RegistryError.

Writers stand in line: a SQLite transaction that writes begins with `BEGIN IMMEDIATE`, and on other databases it first
locks the one row of the schema's version table. So a writer never works on facts that another one is changing.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, CursorResult, Engine, create_engine, event, exc, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.pool import NullPool, StaticPool

from registry.errors import RegistryBusyError, RegistryError, RegistryReadOnlyError
from registry.json_text import json_text, json_value
from registry.names import printable
from registry.schema import version_table

_WRITES = "registry_writes"


class Database:
    """One catalogue's database. `where` names it in errors and never shows a password.

    Threads may share it: each has its own transaction.
    """

    def __init__(self, engine: Engine, where: str, *, read_only: bool = False) -> None:
        self.engine = engine
        self.where = where
        self.read_only = read_only
        self._thread = threading.local()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection to read from: this thread's open write transaction, else its open read transaction, else a new one."""
        outer = self._connection or getattr(self._thread, "reader", None)
        if outer is not None:
            yield outer
            return
        with translated(self.where), self.engine.connect() as connection, connection.begin():
            self._thread.reader = connection
            try:
                yield connection
            finally:
                self._thread.reader = None

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """The write transaction of this thread: committed when the outermost block ends, rolled back if it raises."""
        outer = self._connection
        if outer is not None:
            yield outer
            return
        if self.read_only:
            raise RegistryReadOnlyError(
                f"the registry {self.where} was opened for reading only; open it for writing to change it"
            )
        callbacks: list[Callable[[], None]] = []
        with translated(self.where), write_transaction(self.engine) as connection:
            self._connection, self._thread.callbacks = connection, callbacks
            try:
                connection.execute(select(version_table.c.version_num).with_for_update())
                yield connection
            finally:
                self._connection = None
        for callback in callbacks:
            callback()

    def after_commit(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once this thread's write transaction is committed, and never if it is rolled back."""
        self._thread.callbacks.append(callback)

    def close(self) -> None:
        self.engine.dispose()

    @property
    def _connection(self) -> Connection | None:
        return getattr(self._thread, "connection", None)

    @_connection.setter
    def _connection(self, connection: Connection | None) -> None:
        self._thread.connection = connection


@contextmanager
def write_transaction(engine: Engine) -> Iterator[Connection]:
    """A transaction that holds SQLite's write lock from its beginning."""
    with engine.connect() as connection:
        connection = connection.execution_options(**{_WRITES: True})
        with connection.begin():
            yield connection


def inserted_id(result: CursorResult[Any]) -> int:
    """The id that the database gave to the row of an insert."""
    key = result.inserted_primary_key
    assert key is not None
    return int(key[0])


def parse_url(text: str) -> URL:
    """Raises RegistryError where `text` is no SQLAlchemy URL."""
    try:
        return make_url(text)
    except exc.ArgumentError:
        raise RegistryError(
            f"'{printable(text.rpartition('@')[2])}' is no database URL; write one as SQLAlchemy does, "
            "for a file 'sqlite:////folder/registry.db'"
        ) from None


def file_url(path: Path) -> URL:
    """The URL of a SQLite file."""
    return URL.create("sqlite", database=str(path))


def immutable_url(path: Path) -> URL:
    """The URL of a SQLite file that nobody can write, in a folder where SQLite cannot make its own files either."""
    uri = path.absolute().as_uri()
    return URL.create("sqlite", database=uri, query={"mode": "ro", "immutable": "1", "uri": "true"})


def database_file(url: URL) -> Path | None:
    """The file of a SQLite URL; None for other databases, memory, and `file:` URIs."""
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        return None
    return None if url.database.startswith("file:") else Path(url.database)


def is_in_memory(url: URL) -> bool:
    """Whether the URL is of a SQLite database that ends with its connection."""
    return url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:")


def shown_url(url: URL) -> str:
    """How errors name the database: the file's path, or the URL without its password."""
    path = database_file(url)
    return printable(str(path) if path is not None else url.render_as_string(hide_password=True), longest=400)


def make_engine(url: URL, *, read_only: bool, busy_timeout: float) -> Engine:
    """An engine that opens one connection a transaction. `busy_timeout` is in seconds, and for SQLite alone.

    Raises RegistryError where the database's driver is not installed or the URL names none.
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
            f"the registry URL {shown_url(url)} cannot be used ({_first_line(error)}); write it as SQLAlchemy does"
        ) from None
    if sqlite:
        _set_up_sqlite(engine, read_only=read_only)
    return engine


def _set_up_sqlite(engine: Engine, *, read_only: bool) -> None:
    @event.listens_for(engine, "connect")
    def connected(connection: sqlite3.Connection, record: object) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself: `began` does
        connection.execute("PRAGMA foreign_keys = ON")
        if read_only:
            connection.execute("PRAGMA query_only = ON")

    @event.listens_for(engine, "begin")
    def began(connection: Connection) -> None:
        writes = connection.get_execution_options().get(_WRITES)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Turns what the database and its driver raise into a RegistryError of one sentence that names `where`."""
    try:
        yield
    except exc.DBAPIError as error:
        raise _as_registry_error(error.orig, where) from error
    except exc.StatementError as error:
        if isinstance(error.orig, RegistryError):  # a column type refused a value
            raise error.orig from None
        raise _as_registry_error(error.orig, where) from error
    except (sqlite3.Error, exc.SQLAlchemyError) as error:
        raise _as_registry_error(error, where) from error


def primary_code(error: BaseException | None) -> int | None:
    """SQLite's primary result code of a driver's error, whatever its extension says."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else int(code) & 0xFF


def _as_registry_error(error: BaseException | None, where: str) -> RegistryError:
    match primary_code(error):
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return RegistryBusyError(
                f"the registry {where} is busy: another process is writing to it; try again when it is done"
            )
        case sqlite3.SQLITE_READONLY:
            return RegistryReadOnlyError(
                f"the registry {where} cannot be written; give yourself write permission on the file and its folder, "
                "or set LORATOOL_HOME to a folder of your own"
            )
        case sqlite3.SQLITE_NOTADB:
            return RegistryError(
                f"the registry {where} is not a database; move that file away, or set LORATOOL_HOME to another folder"
            )
        case sqlite3.SQLITE_CORRUPT:
            return RegistryError(
                f"the registry {where} is damaged ({_first_line(error)}); put a backup in its place, "
                "or rescue its rows with SQLite's own '.recover'"
            )
        case sqlite3.SQLITE_FULL:
            return RegistryError(
                f"the disk of the registry {where} is full; nothing was changed: free some space and try again"
            )
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM | sqlite3.SQLITE_AUTH:
            return RegistryError(
                f"the registry {where} cannot be opened; check that its folder exists and that you "
                "may read and write it"
            )
        case sqlite3.SQLITE_IOERR:
            return RegistryError(
                f"the disk of the registry {where} failed ({_first_line(error)}); check its space and health, "
                "then try again"
            )
        case sqlite3.SQLITE_CONSTRAINT:
            return RegistryError(
                f"the registry {where} refused an entry ({_first_line(error)}); run 'loratool doctor' and try again"
            )
        case _:
            return RegistryError(
                f"the registry {where} failed ({_first_line(error)}); check the database and its URL, then try again"
            )


def _first_line(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines()
    return printable(lines[0]) if lines else type(error).__name__
