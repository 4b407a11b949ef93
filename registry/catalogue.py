"""Opening the catalogue: finds the database, brings its schema up to date, and hands out what works on it."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import Engine, exc, func, select
from sqlalchemy.engine import URL

from registry import database as db
from registry.adapters import Adapters
from registry.bases import Bases
from registry.database import Database
from registry.doctor import Doctor
from registry.errors import RegistryError, RegistryReadOnlyError
from registry.lineage import Lineage
from registry.merges import Merges
from registry.names import printable
from registry.places import DATABASE_NAME, STORE_NAME
from registry.records import Counts
from registry.schema import upgrade, version_table
from registry.store import Store
from registry.tables import adapters, bases, merges, metadata
from registry.version import HEAD


class Registry:
    """One open catalogue: `bases`, `adapters`, `lineage` and `merges` in the database, files in the `store`.

    Every method is a transaction of its own; `with registry.writing():` makes several calls one.
    """

    def __init__(self, database: Database, store: Store, url: str | None = None) -> None:
        self._url = url
        self.database = database
        self.store = store
        self.bases = Bases(database)
        self.adapters = Adapters(database, store)
        self.lineage = Lineage(database)
        self.merges = Merges(database)
        self.doctor = Doctor(database, store)

    @classmethod
    def open(
        cls, home: Path, url: str | None = None, *, read_only: bool = False, busy_timeout: float = 10.0
    ) -> Registry:
        """Opens the catalogue of the folder `home`, made if need be, and upgrades its schema if that is older.

        `url` is a SQLAlchemy URL; without one it is the SQLite file `registry.db` in `home`. The store is always in
        `home`. With `read_only` nothing is made or changed, except for an upgrade of the schema, and a catalogue that
        does not exist is empty. `busy_timeout` is how many seconds SQLite waits for another process.

        Raises RegistryError: not a database, cannot be read or written, of a newer loratool, busy, full disk.
        """
        target = db.file_url(home / DATABASE_NAME) if url is None else db.parse_url(url)
        where = db.shown_url(target)
        path = db.database_file(target)
        store = Store(home / STORE_NAME, _identity(home, where, path))
        if path is not None:
            _refuse_under_a_file(path.parent)
        if read_only and (db.is_in_memory(target) or (path is not None and not path.exists())):
            return cls(_empty(where), store, url)
        if url is None and not read_only:
            _make_home(home)
        engine = db.make_engine(target, read_only=read_only, busy_timeout=busy_timeout)
        with db.translated(where):
            try:
                current = _version(engine)
            except exc.DBAPIError as error:
                if not read_only or path is None or not _lacks_write_permission(error) or _has_log(path):
                    raise
                engine = db.make_engine(db.immutable_url(path), read_only=True, busy_timeout=busy_timeout)
                current = _version(engine)
            if current != HEAD:
                changing = db.make_engine(target, read_only=False, busy_timeout=busy_timeout) if read_only else engine
                if path is not None:
                    _use_write_ahead_log(changing, busy_timeout)
                _upgrade(changing, where)
        return cls(Database(engine, where, read_only=read_only), store, url)

    @contextmanager
    def for_writing(self) -> Iterator[Registry]:
        """The catalogue as it can be changed: itself, or where it was opened to read only, opened once more.

        Raises RegistryError.
        """
        if not self.database.read_only:
            yield self
            return
        with Registry.open(self.store.root.parent, self._url) as writable:
            yield writable

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Makes all calls in the block one transaction: all are kept, or, if the block raises, none."""
        with self.database.writing():
            yield

    def counts(self) -> Counts:
        """How many bases, adapters, versions of adapters and merges there are."""
        with self.database.reading() as connection:
            return Counts(
                bases=connection.execute(select(func.count()).select_from(bases)).scalar_one(),
                adapters=connection.execute(select(func.count(func.distinct(adapters.c.name)))).scalar_one(),
                versions=connection.execute(select(func.count()).select_from(adapters)).scalar_one(),
                merges=connection.execute(select(func.count()).select_from(merges)).scalar_one(),
            )

    def close(self) -> None:
        self.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _identity(home: Path, where: str, path: Path | None) -> str:
    """How the store tells this catalogue from others: by the file, whatever its URL is, or by the URL."""
    if path is None:
        return where
    own = home / DATABASE_NAME
    return str(own) if os.path.realpath(path) == os.path.realpath(own) else printable(os.path.realpath(path), 4096)


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


def _lacks_write_permission(error: exc.DBAPIError) -> bool:
    """SQLite cannot read a write-ahead-logged file in a folder where it cannot make the files beside it."""
    return db.primary_code(error.orig) in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)


def _has_log(path: Path) -> bool:
    """Whether commits stand in a log beside the file, which a reader of the file alone would miss."""
    log = path.with_name(f"{path.name}-wal")
    return log.exists() and log.stat().st_size > 0


def _upgrade(engine: Engine, where: str) -> None:
    try:
        with db.write_transaction(engine) as connection:
            upgrade(connection, where)
    except exc.DBAPIError:
        if _version(engine) != HEAD:  # else another process made the same upgrade at the same time
            raise


def _use_write_ahead_log(engine: Engine, busy_timeout: float) -> None:
    """SQLite's write-ahead log, under which readers and one writer never wait for each other. The file remembers it.

    SQLite does not wait for its busy timeout here, so this does.
    """
    deadline = time.monotonic() + busy_timeout
    while True:
        try:
            with closing(engine.raw_connection()) as connection:
                connection.cursor().execute("PRAGMA journal_mode = WAL")
                return
        except (exc.OperationalError, sqlite3.OperationalError) as error:
            if db.primary_code(getattr(error, "orig", error)) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def _empty(where: str) -> Database:
    """A catalogue with nothing in it, in memory: what there is to read where none was made yet."""
    engine = db.make_engine(URL.create("sqlite"), read_only=False, busy_timeout=0)
    metadata.create_all(engine)
    return Database(engine, where, read_only=True)


def _refuse_under_a_file(folder: Path) -> None:
    """Raises RegistryError where a file stands in the place of the registry's folder or of one above it."""
    nearest = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    if nearest.exists() and not nearest.is_dir():
        raise RegistryError(
            f"the registry's folder '{printable(str(folder), 400)}' cannot be: '{printable(str(nearest), 400)}' is a file; "
            "set LORATOOL_HOME to a folder"
        )


def _make_home(home: Path) -> None:
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        shown = printable(str(home), 400)
        kind = RegistryReadOnlyError if isinstance(error, PermissionError) else RegistryError
        raise kind(
            f"the folder '{shown}' for the registry cannot be made ({error.strerror}); "
            "set LORATOOL_HOME to a folder that you may write to"
        ) from None
