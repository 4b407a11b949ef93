"""Opening the catalogue: finds the database, brings its schema up to date, and hands out what works on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import func, select

from registry import backups, reserve
from registry import database as db
from registry.adapters import Adapters
from registry.backups import Backup
from registry.bases import Bases
from registry.database import BUSY_SECONDS, Database
from registry.doctor import Doctor
from registry.labels import Labels
from registry.lineage import Lineage
from registry.merges import Merges
from registry.names import printable
from registry.opening import make_home, open_database, refuse_misplaced
from registry.places import DATABASE_NAME, STORE_NAME
from registry.records import Counts
from registry.store import Store
from registry.tables import adapters, bases, merges


class Registry:
    """One open catalogue: `bases`, `adapters`, `lineage` and `merges` in the database, files in the `store`.

    Every method is a transaction of its own; `with registry.writing():` makes several calls one.
    """

    def __init__(self, database: Database, store: Store, url: str | None = None) -> None:
        self._url = url
        self.database = database
        self.store = store
        self.labels = labels = Labels(database, store)
        self.bases = Bases(database, labels)
        self.adapters = Adapters(database, store, labels)
        self.lineage = Lineage(database, labels)
        self.merges = Merges(database)
        self.doctor = Doctor(database, store, labels, self.adapters, self.bases, self.merges)

    @classmethod
    def open(
        cls, home: Path, url: str | None = None, *, read_only: bool = False, busy_timeout: float = BUSY_SECONDS
    ) -> Registry:
        """Opens the catalogue of the folder `home`, made if need be, and upgrades its schema if that is older.

        `url` is a SQLAlchemy URL; without one it is the SQLite file `registry.db` in `home`. The store is always in
        `home`. With `read_only` nothing is made or changed, except for an upgrade of the schema, and a catalogue that
        does not exist is empty; where nothing can be written, on a full disk say, it is read all the same. `busy_timeout` is
        how many seconds a writer waits for another.

        Raises RegistryError: not a database, cannot be read or written, of a newer loratool, busy, full disk.
        """
        target = db.file_url(home / DATABASE_NAME) if url is None else db.parse_url(url)
        where, path = db.shown_url(target), db.database_file(target)
        store = Store(home / STORE_NAME, _identity(home, where, path))
        if url is None and not read_only:
            refuse_misplaced(home / DATABASE_NAME)
            make_home(home)
            reserve.give_up(home)
        is_new_day = path is not None and not read_only and backups.keep(path)
        registry = cls(open_database(target, read_only=read_only, busy_timeout=busy_timeout), store, url)
        if is_new_day:
            registry.labels.write_missing()
        return registry

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

    def backups(self) -> tuple[Backup, ...]:
        """The backups of the database, the newest first; none where it is no file."""
        return () if self.file is None else backups.backups(self.file)

    @property
    def file(self) -> Path | None:
        """The database's file, whether it exists or not; None where it is no SQLite file."""
        return (
            self.store.root.parent / DATABASE_NAME if self._url is None else db.database_file(db.parse_url(self._url))
        )

    def lost_note(self) -> str | None:
        """What to say of a catalogue without adapters whose store has some; None where all is well."""
        with self.database.reading() as connection:
            if connection.execute(select(adapters.c.id).limit(1)).first() is not None:
                return None
            named = self.adapters.store_keys()
        unnamed = [key for key in self.store.entries() if key not in named]
        if unnamed and self.store.other_catalogues():
            unnamed = list(self.doctor.lost())
        if not unnamed:
            return None
        held = "an adapter" if len(unnamed) == 1 else f"{len(unnamed):,} adapters"
        return (
            f"the catalogue {self.database.where} is empty, but the store beside it holds {held}; "
            "'loratool doctor --rebuild' makes the catalogue again from the store"
        )

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
        if self._url is None and not self.database.read_only:
            reserve.keep(self.store.root.parent)

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
