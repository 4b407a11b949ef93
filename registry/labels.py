"""Updates of the labels in the content store, after each transaction that changes the catalogue's rows.

A label is written after the rows are committed, in a write transaction of its own. So no process writes older facts over newer
ones, and nothing that was rolled back is labelled. A process killed in between leaves a missing or outdated label, which
`refresh_all` repairs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from itertools import chain
from typing import Any

from sqlalchemy import Connection, select, union

from registry import notices
from registry.database import Database
from registry.entries import AT_ONCE, base_entries, entries
from registry.errors import DamagedValueError, RegistryError
from registry.label_files import (
    BASES,
    draft_path,
    label_path,
    labels_of,
    listing,
    own_suffix,
    read_label,
    remove_label,
    write_label,
)
from registry.store import Store
from registry.tables import locations, removed_adapters
from registry.trash_rows import kept_entries

DURABLE = 50
"""Largest number of labels written together with fsync for each. Of more labels, a power cut may lose some."""

Files = Mapping[str, str]
"""The sha256 of an entry's files, by name."""


class Labels:
    """The labels of one catalogue."""

    def __init__(self, database: Database, store: Store) -> None:
        self._database = database
        self._store = store
        self._pending = threading.local()

    def touch(
        self, connection: Connection, adapter_ids: Collection[int], files: Mapping[str, Files] | None = None
    ) -> None:
        """Write the labels of these adapters' entries after this transaction is committed.

        Call it before adapters are removed, too. `files` holds the files of new entries, by key.
        """
        self.touch_keys(connection, [*_keys_of(connection, adapter_ids), *(files or {})], files)

    def touch_keys(self, connection: Connection, keys: Iterable[str], files: Mapping[str, Files] | None = None) -> None:
        """Do the same for entries of the store by their keys, and for the list of bases by the key `BASES`."""
        if getattr(self._pending, "connection", None) is not connection:
            self._pending.connection, self._pending.files = connection, {}
            self._database.after_commit(self._write_pending)
        pending: dict[str, Files | None] = self._pending.files
        for key in keys:
            pending[key] = (files or {}).get(key) or pending.get(key)

    def withdraw(self, connection: Connection, adapter_ids: Collection[int]) -> None:
        """Remove the labels of these adapters' entries at once, before their rows are removed.

        Otherwise, in the moment after the rows are gone, removed adapters would look like lost ones. The labels are written
        again if other adapters share the entries.
        """
        keys = _keys_of(connection, adapter_ids)
        self.touch_keys(connection, keys, {key: files for key in keys if (files := self._listing(key)) is not None})
        for key in keys:
            with suppress(OSError):
                remove_label(label_path(self._store, key, own_suffix(self._store)))

    def touch_bases(self, connection: Connection) -> None:
        """Write the list of bases after this transaction is committed."""
        self.touch_keys(connection, [BASES])

    def refresh_all(self, progress: Callable[[int], None] | None = None) -> None:
        """Write every label that is missing or differs from the rows. Call it in a write transaction."""
        with self._database.reading() as connection:
            named = sorted(named_keys(connection))
            for place in range(0, len(named), AT_ONCE):
                some = named[place : place + AT_ONCE]
                self._write(connection, dict.fromkeys(some), durable=len(named) <= DURABLE)
                if progress is not None:
                    progress(len(some))
            self._write(connection, {BASES: None}, durable=True)
        remove_label(draft_path(self._store))

    def write_missing(self) -> None:
        """Write missing labels, after a kill or for entries older than labels. Errors are ignored."""
        ending = own_suffix(self._store)
        with suppress(OSError, RegistryError), self._database.writing() as connection:
            missing = [
                key for key in sorted(named_keys(connection)) if not label_path(self._store, key, ending).exists()
            ]
            if not label_path(self._store, BASES, ending).exists():
                missing.append(BASES)
            self._write(connection, dict.fromkeys(missing), durable=len(missing) <= DURABLE)

    def _write_pending(self) -> None:
        pending: dict[str, Files | None] = self._pending.files
        self._pending.connection, self._pending.files = None, {}
        try:
            with self._database.writing() as connection:
                self._write(connection, pending, durable=len(pending) <= DURABLE)
        except (OSError, RegistryError) as error:
            # The rows are committed, so this is only a notice; without the label, a rebuild would not restore them.
            notices.say(f"its label in the store could not be written ({error}); 'loratool doctor --gc' writes it")

    def _write(self, connection: Connection, pending: Mapping[str, Files | None], *, durable: bool) -> None:
        ending = own_suffix(self._store)
        if BASES in pending:
            self._write_bases(connection, durable=durable)
        keys = [key for key in pending if key != BASES]
        named = _named(connection, keys)
        known_entries = entries(connection, {each for ids in named.values() for each in ids})
        removed, damaged = kept_entries(connection, keys)
        for key in keys:
            if key in damaged or not named.get(key, set()) <= known_entries.keys():
                continue  # a damaged row is repaired from the label, which stays as it is
            path = label_path(self._store, key, ending)
            said = [known_entries[each] for each in sorted(named.get(key, ()))]
            said += removed.get(key, [])
            if not said or not self._store.path(key).is_dir():
                remove_label(path)
                continue
            label = {"key": key, "adapters": said} | self._files_of(key, pending[key])
            write_label(self._store, path, label, durable=durable)

    def _write_bases(self, connection: Connection, *, durable: bool) -> None:
        path = label_path(self._store, BASES, own_suffix(self._store))
        try:
            known = base_entries(connection)
        except DamagedValueError:
            return
        if known or path.exists():
            write_label(self._store, path, {"bases": known}, durable=durable)

    def _files_of(self, key: str, made: Files | None) -> dict[str, Any]:
        """Return the `sizes` of an entry's files, and their sha256 (`files`) if they are known or were just `made`."""
        said = {} if made else self._said(key)
        files, sizes = made or listing(said, key), said.get("sizes")
        if not isinstance(sizes, dict):
            with os.scandir(self._store.path(key)) as found:
                sizes = {entry.name: entry.stat(follow_symlinks=False).st_size for entry in found}
        return {"sizes": sizes} if files is None else {"files": dict(files), "sizes": sizes}

    def _said(self, key: str) -> dict[str, Any]:
        """Return the content of an entry's label: this catalogue's if it can be read, else another catalogue's."""
        own = label_path(self._store, key, own_suffix(self._store))
        for path in chain([own], labels_of(self._store, key)):
            try:
                label = read_label(path)
            except ValueError:
                continue
            if label is not None:
                return label
        return {}

    def _listing(self, key: str) -> Files | None:
        return listing(self._said(key), key)


def named_keys(connection: Connection) -> set[str]:
    """Return the keys of all store entries that the catalogue or its trash refers to."""
    both = (locations.c.store_key, removed_adapters.c.store_key)
    keys = connection.execute(union(*(select(column).where(column.is_not(None)) for column in both))).scalars()
    return {key for key in keys if key is not None}


def _keys_of(connection: Connection, adapter_ids: Collection[int]) -> list[str]:
    ids = sorted(adapter_ids)
    found: list[str | None] = []
    for place in range(0, len(ids), AT_ONCE):
        some = locations.c.adapter_id.in_(ids[place : place + AT_ONCE])
        found += connection.execute(
            select(locations.c.store_key).where(some, locations.c.store_key.is_not(None))
        ).scalars()
    return [key for key in found if key is not None]


def _named(connection: Connection, keys: Collection[str]) -> dict[str, set[int]]:
    """Return the row ids of the adapters of each of these entries, by key."""
    found: dict[str, set[int]] = {}
    ordered = sorted(keys)
    for place in range(0, len(ordered), AT_ONCE):
        query = select(locations.c.store_key, locations.c.adapter_id)
        for key, adapter_id in connection.execute(
            query.where(locations.c.store_key.in_(ordered[place : place + AT_ONCE]))
        ):
            found.setdefault(key, set()).add(adapter_id)
    return found
