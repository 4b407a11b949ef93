"""Damaged rows: those with a value that cannot be read or makes no sense, and their repair from the labels in the store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import Connection, Table, select, update

from registry.damaged_rows import read_rows
from registry.entry_checks import ROW_CHECKS, Entry, shown
from registry.errors import DamagedValueError
from registry.names import printable
from registry.records import Finding, RemovedAdapter
from registry.tables import adapters, bases, lineage, locations, merges, removed_adapters
from registry.trash_rows import rows as trash_rows

EntriesOf = Callable[[str], list[Entry]]
"""Reads the adapters that the labels of an entry of the store name, by its key."""

_WORDS: Final[Mapping[str, str]] = {"bases": "base", "merges": "merge into", "lineage": "lineage, row"}


@dataclass(frozen=True, slots=True)
class DamagedRow:
    """A damaged row of the tables beside the trash. `faults` says what is wrong with each of its columns."""

    table: Table
    row: Mapping[str, Any]
    faults: Mapping[str, str]

    @property
    def subject(self) -> str:
        """What the row is about: `pirate@1`, the name of a base, the output of a merge, or the number of the row."""
        if self.table is adapters:
            return f"{self.row['name']}@{self.row['version']}"
        word = {"bases": "name", "merges": "output"}.get(self.table.name, "id")
        return printable(f"{_WORDS[self.table.name]} {self.row[word]}", 400)

    @property
    def repairable(self) -> dict[str, Any]:
        """The values of columns that can be given up: nothing, and for the time of the entry the present."""
        return {
            name: datetime.now(UTC) if name == "created_at" else None
            for name in self.faults
            if name == "created_at" or self.table.c[name].nullable
        }


def damaged_rows(connection: Connection) -> list[DamagedRow]:
    """Return the damaged rows of all tables but the trash, with one query for each table if there are none."""
    found = []
    for table in (adapters, bases, merges, lineage):
        for row in read_rows(connection, table):
            faults = _faults(row, ROW_CHECKS if table is adapters else {})
            if faults:
                found.append(DamagedRow(table, row, faults))
    return found


def is_damaged(row: Mapping[str, Any]) -> bool:
    """Whether one of these columns of an adapter's row is damaged."""
    return bool(_faults(row, ROW_CHECKS))


def _faults(row: Mapping[str, Any], checks: Mapping[str, Callable[[Any], bool]]) -> dict[str, str]:
    return {name: fault for name, value in row.items() if (fault := _fault(name, value, checks)) is not None}


def _fault(name: str, value: object, checks: Mapping[str, Callable[[Any], bool]]) -> str | None:
    if isinstance(value, DamagedValueError):
        return f"{name}: {value.reason}"
    if name in checks and not checks[name](value):
        return f"{name}: it holds '{shown(value)}'"
    return None


def findings(connection: Connection, trash: Iterable[RemovedAdapter], entries_of: EntriesOf) -> list[Finding]:
    """Return a finding for each damaged row, of the `trash` too, that says how to repair it."""
    found = [_finding(each.subject, "; ".join(each.faults.values()), _way(each)) for each in damaged_rows(connection)]
    for removed in trash:
        if removed.fault is not None:
            way = f"forget it with 'loratool remove {removed.reference} --now', which frees its files too"
            if _labelled(removed.sha256, removed.reference, _keys(removed), entries_of) is not None:
                way = "its label in the store has all of it: 'loratool doctor --rebuild' repairs the row"
            found.append(_finding(f"{removed.reference} in the trash", removed.fault, way, removed.reference))
    return found


def _finding(what: str, fault: str, way: str, subject: str | None = None) -> Finding:
    message = f"the row of {what} is damaged ({fault}); {way}"
    return Finding(kind="row-damaged", subject=subject or what, path=None, message=message)


def _way(damaged: DamagedRow) -> str:
    if damaged.repairable.keys() != damaged.faults.keys():
        return "restore a backup of the registry"
    return (
        "'loratool doctor --rebuild' repairs it from its label in the store, and leaves empty what no label says"
        if damaged.table is adapters
        else "'loratool doctor --rebuild' leaves empty what cannot be read"
    )


def repair(connection: Connection, entries_of: EntriesOf) -> list[str]:
    """Correct damaged rows from the labels; leave empty what no label says, in the trash nothing. Return what was repaired."""
    repaired = []
    for each in damaged_rows(connection):
        values = each.repairable
        if values.keys() != each.faults.keys():
            continue
        if each.table is adapters:
            query = select(locations.c.store_key).where(
                locations.c.adapter_id == each.row["id"], locations.c.store_key.is_not(None)
            )
            keys = [key for key in connection.execute(query).scalars() if key is not None]
            known = _labelled(each.row["sha256"], each.subject, keys, entries_of)
            values |= {} if known is None else {name: _value(name, known) for name in values}
        connection.execute(update(each.table).where(each.table.c.id == each.row["id"]).values(values))
        repaired.append(each.subject)
    for removed in trash_rows(connection):
        if removed.fault is None:
            continue
        known = _labelled(removed.sha256, removed.reference, _keys(removed), entries_of)
        if known is not None:
            entry = {name: value for name, value in known.items() if name != "removed_at"}
            said = known.get("removed_at")
            moment = datetime.fromisoformat(said) if said else removed.removed_at
            row = update(removed_adapters).where(removed_adapters.c.id == removed.id)
            connection.execute(row.values(entry=entry, removed_at=moment))
            repaired.append(f"{removed.reference} in the trash")
    return repaired


def _value(name: str, entry: Entry) -> Any:
    return datetime.fromisoformat(entry[name]) if name == "created_at" else entry.get(name)


def _keys(removed: RemovedAdapter) -> list[str]:
    return [] if removed.store_key is None else [removed.store_key]


def _labelled(sha256: str, reference: str, keys: Iterable[str], entries_of: EntriesOf) -> Entry | None:
    """Return what a label says of an adapter; None if none names it."""
    for key in keys:
        for entry in entries_of(key):
            if entry["sha256"] == sha256 and f"{entry['name']}@{entry['version']}" == reference:
                return entry
    return None
