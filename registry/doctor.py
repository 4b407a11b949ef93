"""Checks the catalogue against the disk, and frees what nothing names."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from registry.adapters import Adapters
from registry.bases import Bases
from registry.database import Database
from registry.errors import NotSureError
from registry.labels import Labels
from registry.merges import Merges
from registry.names import printable
from registry.places import is_gone
from registry.rebuild import Rebuild
from registry.records import AdapterRecord, Finding, Freed, Rebuilt
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

    def examine(self, *, deep: bool = False) -> tuple[Finding, ...]:
        """Everything wrong: adapters, bases, merge outputs and undo files that are gone, store entries nothing names.

        `deep` also reads every file in the store again and compares its hash.
        """
        with self._database.reading():
            found = [*self._missing_bases(), *self._missing_adapters(), *self._missing_merges()]
        found += self._orphans()
        return tuple([*found, *self._damaged()] if deep else found)

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
        with (
            self._database.writing()
        ):  # rows first, then files: what is killed in between leaves files, and no row without
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
        return {key: names for key, names in self._rebuild.lost().items() if key not in named}

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

    def _missing_bases(self) -> Iterator[Finding]:
        for base in self._bases.list():
            # One whose files on the Hub are known is downloaded again when it is needed.
            if base.path is not None and is_gone(base.path) and not (base.files and base.revision):
                yield Finding(
                    kind="base-missing",
                    subject=base.name,
                    path=base.path,
                    message=f"the files of base '{base.name}' are gone; add it again from where they are, or remove "
                    f"it with 'loratool base remove {base.name}'",
                )

    def _missing_adapters(self) -> Iterator[Finding]:
        for summary in self._adapters.list():
            record = self._adapters.get(summary.id)
            if record is not None:
                yield from self._missing_files(record)

    def _missing_files(self, record: AdapterRecord) -> Iterator[Finding]:
        """One finding where no place holds the files any more, or the store lost what another place still has."""
        in_store = [self._store.path(place.store_key) for place in record.locations if place.store_key is not None]
        elsewhere = [place.path for place in record.locations if place.path is not None]
        lost = [path for path in (*in_store, *elsewhere) if is_gone(path)]
        gone = len(lost) == len(in_store) + len(elsewhere) and not any(place.repo for place in record.locations)
        if gone or any(path in in_store for path in lost):
            yield Finding(
                kind="adapter-files-missing",
                subject=record.reference,
                path=lost[0] if lost else None,
                message=f"the files of {record.reference} are gone {'from everywhere' if gone else 'from the store'}; "
                "add them again with 'loratool add', or remove it with 'loratool remove'",
            )

    def _missing_merges(self) -> Iterator[Finding]:
        for merge in self._merges.list(state="merged"):
            adapters = " + ".join(member.adapter for member in merge.adapters)
            if is_gone(merge.output):
                yield Finding(
                    kind="merge-output-missing",
                    subject=adapters,
                    path=merge.output,
                    message=f"the model merged from {adapters} is no longer at '{printable(str(merge.output), 400)}'; put it "
                    "back or merge again if you need it, or let 'loratool doctor --gc' note that it is gone",
                )
            elif merge.undo_file is not None and is_gone(merge.undo_file):
                yield Finding(
                    kind="undo-file-missing",
                    subject=adapters,
                    path=merge.undo_file,
                    message=f"the undo file of the merge of {adapters} is no longer at "
                    f"'{printable(str(merge.undo_file), 400)}'; put it back, or let 'loratool doctor --gc' note that "
                    "'loratool unmerge' needs the base instead",
                )

    def _orphans(self) -> Iterator[Finding]:
        if self._store.other_catalogues():
            return  # what this one does not name may be theirs
        named = self._adapters.store_keys()
        lost = self.lost()
        way = "'loratool doctor --gc' frees it"
        entries = [(key, self._store.path(key)) for key in self._store.entries() if key not in named]
        for subject, path in [*entries, *((path.name, path) for path in self._store.abandoned())]:
            shown = printable(str(path), 400)
            message = f"nothing in the catalogue names '{shown}' in the store; {way}"
            if subject in lost:
                names = " and ".join(lost[subject])
                message = (
                    f"the catalogue has lost {names}, whose files are in '{shown}'; 'loratool doctor --rebuild' names what "
                    "the store has again"
                )
            elif not named and len(entries) > 0:  # more likely a lost catalogue than a store of nothing but leftovers
                message = (
                    f"nothing in the catalogue names '{shown}' in the store; if {self._database.where} was lost, put a backup "
                    f"of it in its place, else catalogue this with 'loratool add {shown} --name NAME', or free it for good "
                    "with 'loratool doctor --gc --yes'"
                )
            yield Finding(
                kind="store-orphan",
                subject=subject,
                path=path,
                message=message,
                size_bytes=self._store.size_bytes(path),
            )

    def _damaged(self) -> Iterator[Finding]:
        for key in sorted(self._adapters.store_keys()):
            if self._store.path(key).exists() and not self._store.is_whole(key):
                yield Finding(
                    kind="store-damaged",
                    subject=key,
                    path=self._store.path(key),
                    message="the files of this entry of the store have changed; remove the folder, then add the "
                    "adapter again",
                )
