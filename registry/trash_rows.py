"""The rows of the trash: removed adapters, each with its entry as JSON (`registry.entries`) and the time of its removal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, func, insert, select

from registry.damaged_rows import read_rows
from registry.entries import AT_ONCE, entries
from registry.entry_checks import LabelError, check_entry
from registry.errors import DamagedValueError, RegistryError
from registry.json_text import json_text
from registry.names import printable
from registry.records import RemovedAdapter
from registry.tables import locations, removed_adapters


def keep(connection: Connection, adapter_ids: Collection[int]) -> None:
    """Insert adapters into the trash, before their rows are deleted."""
    found = entries(connection, adapter_ids)
    query = select(locations.c.adapter_id, locations.c.store_key).where(
        locations.c.adapter_id.in_(found.keys()), locations.c.store_key.is_not(None)
    )
    keys = {row.adapter_id: row.store_key for row in connection.execute(query)}
    moment = datetime.now(UTC)
    for adapter_id, entry in sorted(found.items()):
        put(connection, entry, keys.get(adapter_id), moment)


def put(connection: Connection, entry: Mapping[str, Any], store_key: str | None, removed_at: datetime) -> None:
    """Insert one adapter, given as JSON."""
    connection.execute(
        insert(removed_adapters).values(
            name=entry["name"],
            version=entry["version"],
            sha256=entry["sha256"],
            store_key=store_key,
            entry={key: value for key, value in entry.items() if key != "removed_at"},
            removed_at=removed_at,
        )
    )


def forget(connection: Connection, ids: Iterable[int]) -> None:
    """Delete rows of the trash by their ids."""
    connection.execute(delete(removed_adapters).where(removed_adapters.c.id.in_(list(ids))))


def kept(connection: Connection, name: str, version: int | None = None) -> list[RemovedAdapter]:
    """Return the removed adapters of a name, or of one version of it, lowest version first."""
    return rows(connection, is_named(name, version))


def kept_entries(connection: Connection, keys: Collection[str]) -> tuple[dict[str, list[dict[str, Any]]], set[str]]:
    """Return the removed adapters of these store entries as JSON with `removed_at`, by key, and the keys of damaged rows."""
    found: dict[str, list[dict[str, Any]]] = {}
    damaged: set[str] = set()
    ordered = sorted(keys)
    for place in range(0, len(ordered), AT_ONCE):
        some = removed_adapters.c.store_key.in_(ordered[place : place + AT_ONCE])
        for each in map(removed, read_rows(connection, removed_adapters, some)):
            assert each.store_key is not None
            if each.fault is not None:
                damaged.add(each.store_key)
            else:
                entry = {**each.entry, "removed_at": each.removed_at.isoformat()}
                found.setdefault(each.store_key, []).append(entry)
    return found, damaged


def newest_version(connection: Connection, name: str) -> int:
    """Return the highest version of a name in the trash; 0 if there is none."""
    query = select(func.max(removed_adapters.c.version)).where(removed_adapters.c.name == name)
    return int(connection.execute(query).scalar() or 0)


def is_named(name: str, version: int | None) -> ColumnElement[bool]:
    """Return the condition that a row has this name, and this version if one is given."""
    named = removed_adapters.c.name == name
    return named if version is None else named & (removed_adapters.c.version == version)


def rows(connection: Connection, condition: ColumnElement[bool] | None = None) -> list[RemovedAdapter]:
    """Return the rows that satisfy a condition, sorted by name and version."""
    order = (removed_adapters.c.name, removed_adapters.c.version)
    return [removed(row) for row in read_rows(connection, removed_adapters, condition, order=order)]


def removed(row: Mapping[str, Any]) -> RemovedAdapter:
    """Return a row as a record, with its fault if it is damaged. A damaged date becomes the present, so that nothing is freed."""
    entry, removed_at = row["entry"], row["removed_at"]
    fault = _fault(row)
    facts = {} if fault is not None else entry
    return RemovedAdapter(
        id=row["id"],
        name=row["name"],
        version=row["version"],
        sha256=row["sha256"],
        store_key=row["store_key"],
        size_bytes=facts.get("size_bytes", 0),
        kind=facts.get("kind", "?"),
        removed_at=removed_at if isinstance(removed_at, datetime) else datetime.now(UTC),
        entry=facts,
        fault=fault,
    )


def _fault(row: Mapping[str, Any]) -> str | None:
    damaged = next((value.reason for value in row.values() if isinstance(value, DamagedValueError)), None)
    if damaged is not None:
        return damaged
    try:
        entry = check_entry(row["entry"])
        json_text(entry).encode()  # neither NaN nor a lone surrogate, which no row of an adapter could hold
    except LabelError as error:
        return str(error)
    except (ValueError, RegistryError):
        return "it holds a text or a number that no database keeps"
    different = next((name for name in ("name", "version", "sha256") if entry[name] != row[name]), None)
    return None if different is None else f"its {different} is '{printable(str(row[different]), 40)}' and another one"
