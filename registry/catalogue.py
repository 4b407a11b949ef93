"""The open catalogue: its database, whose schema is upgraded on opening, and its content store."""

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
from registry.trash import Trash


class Registry:
    """One open catalogue: `bases`, `adapters`, `lineage` and `merges` in the database, files in the `store`.

    Every method is one transaction. Calls within `with registry.writing():` share one.
    """

    def __init__(self, database: Database, store: Store, url: str | None = None) -> None:
        self._url = url
        self.database = database
        self.store = store
        self.labels = labels = Labels(database, store)
        self.bases = Bases(database, labels)
        self.adapters = Adapters(database, store, labels)
        self.trash = Trash(database, store, labels)
        self.lineage = Lineage(database, labels)
        self.merges = Merges(database)
        self.doctor = Doctor(database, store, labels, self.adapters, self.trash, self.bases, self.merges)

    @classmethod
    def open(
        cls, home: Path, url: str | None = None, *, read_only: bool = False, busy_timeout: float = BUSY_SECONDS
    ) -> Registry:
        """Open the catalogue in the folder `home`, which is made if it is missing, and upgrade an older schema.

        `url` is a SQLAlchemy URL, by default that of the SQLite file `registry.db` in `home`. The store is always in `home`.
        With `read_only`, nothing is made or changed except for an upgrade of the schema. A catalogue that does not exist is
        then empty, and one that cannot be written, for example on a full disk, can still be read. `busy_timeout` is the time
        in seconds that a writer waits for another.

        Raises RegistryError: not a database, cannot be read or written, written by a newer loratool, busy, full disk.
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
        """Yield the catalogue for writing: this one, or if it is read-only, the same catalogue opened again.

        Raises RegistryError.
        """
        if not self.database.read_only:
            yield self
            return
        with Registry.open(self.store.root.parent, self._url) as writable:
            yield writable

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Make all calls in the block one transaction, which is rolled back if the block raises."""
        with self.database.writing():
            yield

    def backups(self) -> tuple[Backup, ...]:
        """Return the backups of the database, newest first; none if it is not a file."""
        return () if self.file is None else backups.backups(self.file)

    @property
    def file(self) -> Path | None:
        """The database's file, which may not exist; None if it is not a SQLite file."""
        return (
            self.store.root.parent / DATABASE_NAME if self._url is None else db.database_file(db.parse_url(self._url))
        )

    def lost_note(self) -> str | None:
        """Return a note if the catalogue has no adapters but its store has some, else None."""
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
        """Return the numbers of bases, adapters, versions of adapters and merges."""
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
    """Return the name of the catalogue in its store: the path of its SQLite file, or its URL without a password."""
    if path is None:
        return where
    own = home / DATABASE_NAME
    return str(own) if os.path.realpath(path) == os.path.realpath(own) else printable(os.path.realpath(path), 4096)
