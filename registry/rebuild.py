"""Restoring of a lost or emptied catalogue from the labels in its content store."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from registry.damaged_rows import read_rows
from registry.database import Database
from registry.entering import enter, enter_bases, enter_parents, label_of, named_base, relink
from registry.entry_checks import Entry, LabelError, check_base, check_entry
from registry.label_files import BASES, label_path, labels_of, own_suffix, read_label
from registry.labels import Labels, named_keys
from registry.names import printable, to_paste
from registry.records import Finding, Rebuilt
from registry.repair import is_damaged, repair
from registry.store import Store
from registry.tables import adapters
from registry.trash_rows import put
from registry.trash_rows import rows as trash_rows


class Rebuild:
    """Restoring of one catalogue from its own labels and those of catalogues that no longer exist."""

    def __init__(self, database: Database, store: Store, labels: Labels) -> None:
        self._database = database
        self._store = store
        self._labels = labels

    def run(self) -> Rebuilt:
        """Add the adapters and bases of labels that have no row, and repair damaged rows. Repeating it adds nothing.

        Rows that are not damaged stay as they are.

        If another adapter has taken the number of a version, the version gets the next one. The store does not record merges.

        Raises:
            RegistryError: the catalogue cannot be written.
        """
        with self._database.writing() as connection:
            repaired = repair(connection, lambda key: self.adapters_of(key)[0])
            named = named_keys(connection)
            lost, unnamed = self._sorted(connection, self._store.entries(), named)
            bases = enter_bases(connection, self._bases([entry for _, entry in lost]))
            for key, entry in lost:
                if entry.get("removed_at"):
                    put(connection, entry, key, datetime.fromisoformat(entry["removed_at"]))
            entered = [(*enter(connection, entry, key), entry) for key, entry in lost if not entry.get("removed_at")]
            for adapter_id, _, entry in entered:
                relink(connection, adapter_id, label_of(entry), entry["sha256"])
            for adapter_id, _, entry in entered:
                enter_parents(connection, adapter_id, entry)
            self._labels.touch_keys(connection, [*sorted(named), *(key for key, _ in lost), BASES])
        return Rebuilt(
            named=tuple(sorted(_called(reference, entry) for _, reference, entry in entered)),
            bases=tuple(sorted(bases)),
            unnamed=tuple(unnamed),
            repaired=tuple(sorted(repaired)),
        )

    def lost(self, keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Return the references of the adapters that a rebuild would restore from these entries, by key."""
        with self._database.reading() as connection:
            found: dict[str, tuple[str, ...]] = {}
            for key, entry in self._sorted(connection, keys)[0]:
                if entry.get("removed_at"):
                    continue  # the user removed it
                found[key] = (*found.get(key, ()), label_of(entry))
            return found

    def _sorted(
        self, connection: Connection, keys: Iterable[str], named: Collection[str] = ()
    ) -> tuple[list[tuple[str, Entry]], list[Finding]]:
        """Return the labels' adapters without a row, and findings on entries with neither a label nor a row that is `named`."""
        rows = read_rows(connection, adapters, columns=(*_IDENTITY, "version"))
        removed = trash_rows(connection)
        known = {_identity(row) for row in rows if not is_damaged(row)} | {
            _identity(each.entry) for each in removed if each.fault is None
        }
        # A damaged row has its adapter all the same: its label is to repair it.
        damaged = {(row["name"], row["version"], row["sha256"]) for row in rows if is_damaged(row)} | {
            (each.name, each.version, each.sha256) for each in removed if each.fault is not None
        }
        taken = {(row["name"], row["version"]) for row in rows}
        lost: list[tuple[str, Entry]] = []
        unnamed: list[Finding] = []
        for key in keys:
            found, problem = self.adapters_of(key)
            missing = [
                entry
                for entry in found
                if _identity(entry) not in known and (entry["name"], entry["version"], entry["sha256"]) not in damaged
            ]
            known.update(map(_identity, missing))
            lost += [(key, entry) for entry in missing]
            if not found and key not in named:
                unnamed.append(self._unnamed(key, problem))
        # By date; versions whose number is taken come last, so that the others keep theirs.
        lost.sort(key=lambda each: ((each[1]["name"], each[1]["version"]) in taken, each[1]["created_at"]))
        return lost, unnamed

    def adapters_of(self, key: str) -> tuple[list[Entry], str]:
        """Return the adapters of a store entry by its labels, and the reason if there are none."""
        found: dict[tuple[str, str], Entry] = {}
        if not self._store.is_key(key):
            return [], "is not an entry"
        problem = "has no label that names its adapter"
        for path in self._labels_to_read(key):
            try:
                value = read_label(path)
                said = [] if value is None else value.get("adapters")
                if not isinstance(said, list):
                    raise LabelError("it names no adapters")
                for each in said:
                    entry = check_entry(each)
                    found.setdefault((entry["name"], entry["sha256"]), entry)
            except ValueError as error:
                problem = f"has a label that cannot be used ({error})"
        return list(found.values()), problem

    def _labels_to_read(self, key: str) -> list[Path]:
        """Return this catalogue's label of an entry, and those of catalogues that no longer exist."""
        living = {own_suffix(self._store, other) for other in self._store.other_catalogues()}
        own = label_path(self._store, key, own_suffix(self._store))
        others = [path for path in labels_of(self._store, key) if path.name[len(key) :] not in living and path != own]
        return [own, *others]

    def _bases(self, found: list[Entry]) -> list[Entry]:
        """Return the bases in the lists of bases; without any list, those that adapters name, with the few known facts."""
        listed: list[Entry] = []
        has_list = False
        for path in self._labels_to_read(BASES):
            try:
                said = (read_label(path) or {}).get("bases")
                if isinstance(said, list):
                    listed += map(check_base, said)
                    has_list = True
            except ValueError:
                continue
        return listed if has_list else [base for entry in found if (base := named_base(entry)) is not None]

    def _unnamed(self, key: str, problem: str) -> Finding:
        folder = self._store.path(key)
        shown = printable(str(folder), 400)
        return Finding(
            kind="store-orphan",
            subject=key,
            path=folder,
            message=f"'{shown}' {problem}; name it with {to_paste('loratool add PATH --name NAME', folder)}, or free it "
            "for good with 'loratool doctor --gc --yes'",
            size_bytes=self._store.size_bytes(folder),
        )


_IDENTITY = ("name", "sha256", "kind", "rank", "alpha", "scaling")
"""Facts that two adapters of one name must share to be the same version."""


def _identity(facts: Mapping[str, Any]) -> tuple[Any, ...]:
    scaling = facts.get("scaling")
    plain = json.dumps(scaling, sort_keys=True) if isinstance(scaling, dict) else scaling
    return (*(facts.get(name) for name in _IDENTITY[:-1]), plain)


def _called(reference: str, entry: Entry) -> str:
    """Return an adapter's reference, with its former one if that differs."""
    return reference if reference == label_of(entry) else f"{reference} (was {label_of(entry)})"
