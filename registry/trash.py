"""The trash: adapters that were removed, whose files stay in the store until it is emptied.

A removed adapter is one row with its entry as JSON (`registry.entries`). From it everything is restored: name, version, tags,
base, places, lineage in both directions, and its merges.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import Connection, select

from registry.database import Database
from registry.entering import enter, enter_parents, label_of, relink
from registry.errors import InUseError, NotFoundError, RegistryError
from registry.labels import Labels
from registry.names import nearest_names, not_found_message, parse_reference
from registry.records import RemovedAdapter
from registry.store import Store
from registry.tables import removed_adapters
from registry.trash_rows import forget, is_named, rows

KEPT_DAYS = 30
"""Number of days for which removed adapters are kept, unless they are freed earlier."""


class Trash:
    """The removed adapters of one catalogue."""

    def __init__(self, database: Database, store: Store, labels: Labels) -> None:
        self._database = database
        self._store = store
        self._labels = labels

    def list(self, *, sha256: str | None = None) -> tuple[RemovedAdapter, ...]:
        """Return the removed adapters, or those with these weights, last removed first."""
        condition = None if sha256 is None else removed_adapters.c.sha256 == sha256
        with self._database.reading() as connection:
            found = rows(connection, condition)
        return tuple(sorted(found, key=lambda each: (each.removed_at, each.id), reverse=True))

    def files(self, removed: RemovedAdapter) -> Path | None:
        """Return the store's folder with a removed adapter's files; None if there is none."""
        folder = None if removed.store_key is None else self._store.path(removed.store_key)
        return folder if folder is not None and folder.is_dir() else None

    def restore(self, reference: str, *, all_versions: bool = False) -> tuple[int, ...]:
        """Restore one version, or all of a name that are in the trash. Return their new row ids.

        If another adapter has taken the number of a version, the version gets the next one.

        Raises:
            InvalidNameError: `reference` is not a valid name.
            NotFoundError: it is not in the trash, or its files are gone.
            InUseError: `reference` has no version, the trash has several of that name, and `all_versions` is off.
        """
        wanted = parse_reference(reference)
        with self._database.writing() as connection:
            found = rows(connection, is_named(wanted.name, wanted.version))
            if not found:
                raise self._not_found(connection, reference)
            if wanted.version is None and len(found) > 1 and not all_versions:
                raise _several(found)
            put_back = []
            for removed in found:
                if removed.store_key is not None and self.files(removed) is None:
                    raise NotFoundError(
                        f"the files of {removed.reference} are gone from the trash; add them again with 'loratool add'"
                    )
                if removed.fault is not None:
                    raise RegistryError(
                        f"the row of {removed.reference} in the trash is damaged ({removed.fault}), so that it cannot be "
                        "restored; 'loratool doctor' says what to do"
                    )
                forget(connection, [removed.id])
                put_back.append((enter(connection, removed.entry, removed.store_key)[0], removed.entry))
            for adapter_id, entry in put_back:
                relink(connection, adapter_id, label_of(entry), entry["sha256"])
            for adapter_id, entry in put_back:
                enter_parents(connection, adapter_id, entry)
            ids = tuple(adapter_id for adapter_id, _ in put_back)
            self._labels.touch(connection, ids)
            return ids

    def empty(self, days: float = KEPT_DAYS) -> tuple[str, ...]:
        """Forget what was removed `days` ago or earlier; return the references. No row refers to the files any more."""
        oldest = datetime.now(UTC) - timedelta(days=days)
        with self._database.writing() as connection:
            doomed = [
                each for each in rows(connection, removed_adapters.c.removed_at <= oldest) if each.removed_at <= oldest
            ]
            forget(connection, [each.id for each in doomed])
            # Labels are removed with their entries, and written again for entries that other adapters share.
            self._labels.touch_keys(connection, [each.store_key for each in doomed if each.store_key is not None])
            return tuple(each.reference for each in doomed)

    def _not_found(self, connection: Connection, reference: str) -> NotFoundError:
        names = connection.execute(select(removed_adapters.c.name).distinct()).scalars()
        nearest = nearest_names(reference.partition("@")[0], names)
        message = not_found_message("adapter", reference, nearest, "loratool restore")
        return NotFoundError(message.replace("is in the catalogue", "is in the trash"), nearest)


def _several(found: Sequence[RemovedAdapter]) -> InUseError:
    name, references = found[0].name, sorted({each.reference for each in found})
    if len(references) == 1:  # a rename brings that about
        return InUseError(
            f"{len(found)} adapters in the trash were called '{references[0]}'; restore them with --all, and all but one get "
            "the next versions"
        )
    return InUseError(
        f"the trash has {len(found)} versions of '{name}'; name one of them, as in '{found[-1].reference}', or restore them "
        "all with --all"
    )
