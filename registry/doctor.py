"""Check of the catalogue against the disk, and freeing of files that nothing refers to."""

from __future__ import annotations

from collections.abc import Collection

from registry.adapters import Adapters
from registry.bases import Bases
from registry.database import Database
from registry.errors import NotSureError
from registry.examination import Examination, Watcher
from registry.labels import Labels
from registry.merges import Merges
from registry.names import printable
from registry.rebuild import Rebuild
from registry.records import Finding, Freed, Rebuilt
from registry.store import Store
from registry.trash import KEPT_DAYS, Trash


class Doctor:
    """Comparison of one catalogue with the files on disk."""

    def __init__(self, database: Database, store: Store, labels: Labels, adapters: Adapters, trash: Trash, bases: Bases,
                 merges: Merges) -> None:  # fmt: skip
        self._database = database
        self._store = store
        self._labels = labels
        self._adapters, self._bases, self._merges = adapters, bases, merges
        self._trash = trash
        self._rebuild = Rebuild(database, store, labels)

    def examine(self, *, deep: bool = False, watcher: Watcher | None = None) -> tuple[Finding, ...]:
        """Return all faults: missing adapters, bases, merge outputs and undo files, and store entries without a row.

        By the label of a store's entry, missing files and files of another size are found. With `deep`, every file in the
        store is read and its sha256 compared. `watcher` receives the number of adapters checked, or of bytes read.
        """
        return Examination(self._database, self._store, self._bases, self._merges, self._rebuild, watcher).run(
            deep=deep
        )

    def collect(self, *, sure: bool = False, trash_days: float = KEPT_DAYS) -> Freed:
        """Remove store entries that no row refers to, and remains of processes that were killed a day ago or earlier.

        Adapters that have been in the trash for `trash_days` are forgotten first. Merges whose models or undo files are gone,
        or exist again, are recorded as such.

        Raises:
            NotSureError: this would free files that `rebuild` could restore, or most of the store, and `sure` is off.
        """
        with self._database.writing():
            if not sure:
                self._refuse_doubtful(self._adapters.store_keys())
            merges = self._merges.note_gone()
            emptied = self._trash.empty(trash_days)
        with self._database.writing():  # rows first, then files: a kill in between leaves only files without a row
            entries, size_bytes = self._store.collect(self._adapters.store_keys())
            self._labels.refresh_all()
        return Freed(
            entries=entries,
            size_bytes=size_bytes,
            merges=merges,
            shared_with=tuple(self._store.other_catalogues()),
            emptied=emptied,
        )

    def rebuild(self) -> Rebuilt:
        """Restore the catalogue from the store's labels. Existing rows stay as they are.

        Raises:
            RegistryError: the catalogue cannot be written.
        """
        return self._rebuild.run()

    def lost(self) -> dict[str, tuple[str, ...]]:
        """Return the store's entries that `rebuild` would restore, by key, with the adapters' references."""
        named = self._adapters.store_keys()
        return self._rebuild.lost(key for key in self._store.entries() if key not in named)

    def _refuse_doubtful(self, named: Collection[str]) -> None:
        if self._store.other_catalogues():
            return  # nothing would be freed
        sizes = {key: self._store.size_bytes(self._store.path(key)) for key in self._store.entries()}
        doomed = sorted(sizes.keys() - set(named))
        lost = self.lost()
        if lost:
            names = sorted(name for each in lost.values() for name in each)
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
            raise NotSureError(
                f"--gc would free {shown}, which the store has and the catalogue has lost; 'loratool doctor --rebuild' "
                "restores what the store has, and 'loratool doctor --gc --yes' frees it for good"
            )
        freed = sum(sizes[key] for key in doomed)
        if 2 * freed > sum(sizes.values()):
            raise NotSureError(
                f"--gc would free most of the store '{printable(str(self._store.root), 400)}' ({len(doomed):,} of "
                f"{len(sizes):,} entries, {freed:,} bytes), which nothing in {self._database.where} refers to; if that catalogue "
                "was lost, restore a backup of it, else 'loratool doctor --gc --yes' frees it for good"
            )
