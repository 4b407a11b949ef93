"""Checks the catalogue against the disk, and frees what nothing names."""

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
    """Compares one catalogue with what is really there."""

    def __init__(self, database: Database, store: Store, labels: Labels, adapters: Adapters, trash: Trash, bases: Bases,
                 merges: Merges) -> None:  # fmt: skip
        self._database = database
        self._store = store
        self._labels = labels
        self._adapters, self._bases, self._merges = adapters, bases, merges
        self._trash = trash
        self._rebuild = Rebuild(database, store, labels)

    def examine(self, *, deep: bool = False, watcher: Watcher | None = None) -> tuple[Finding, ...]:
        """Everything wrong: adapters, bases, merge outputs and undo files that are gone, store entries nothing names.

        A file of a store's entry that is missing or has another size is found by the entry's label; `deep` also reads every
        file in the store again and compares its hash. `watcher` is told how many adapters are checked, or bytes read.
        """
        return Examination(self._database, self._store, self._bases, self._merges, self._rebuild, watcher).run(
            deep=deep
        )

    def collect(self, *, sure: bool = False, trash_days: float = KEPT_DAYS) -> Freed:
        """Removes from the store what no row names, and what killed processes left there a day ago or longer.

        What has been in the trash for so many days is forgotten first. Of merges whose models or undo files are gone it notes
        that they are, and of models that are there again that, too.

        Raises NotSureError where that would free what `rebuild` could name, or most of the store, unless `sure`.
        """
        with self._database.writing():
            if not sure:
                self._refuse_doubtful(self._adapters.store_keys())
            merges = self._merges.note_gone()
            emptied = self._trash.empty(trash_days)
        with self._database.writing():  # rows first, then files: a kill in between leaves files that nothing names
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
        """Makes the catalogue again from what the store's labels say; rows that are there stay as they are.

        Raises RegistryError.
        """
        return self._rebuild.run()

    def lost(self) -> dict[str, tuple[str, ...]]:
        """The store's entries that no row names and `rebuild` would name, by key, with the adapters' references."""
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
                "names what the store has again, and 'loratool doctor --gc --yes' frees it for good"
            )
        freed = sum(sizes[key] for key in doomed)
        if 2 * freed > sum(sizes.values()):
            raise NotSureError(
                f"--gc would free most of the store '{printable(str(self._store.root), 400)}' ({len(doomed):,} of "
                f"{len(sizes):,} entries, {freed:,} bytes), which nothing in {self._database.where} names; if that catalogue "
                "was lost, put a backup of it in its place, else 'loratool doctor --gc --yes' frees it for good"
            )
