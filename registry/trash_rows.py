"""The rows of the trash: removed adapters, each with its entry as JSON (`registry.entries`) and the time of its removal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, delete, func, insert, select

from registry.entries import AT_ONCE, entries
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
    return [removed(row) for row in rows(connection, is_named(name, version))]


def kept_entries(connection: Connection, keys: Collection[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the removed adapters of these store entries as JSON with `removed_at`, by the entries' keys."""
    found: dict[str, list[dict[str, Any]]] = {}
    ordered = sorted(keys)
    for place in range(0, len(ordered), AT_ONCE):
        some = removed_adapters.c.store_key.in_(ordered[place : place + AT_ONCE])
        for row in connection.execute(select(removed_adapters).where(some).order_by(removed_adapters.c.id)):
            found.setdefault(row.store_key, []).append(row.entry | {"removed_at": row.removed_at.isoformat()})
    return found


def kept_keys(connection: Connection) -> set[str]:
    """Return the keys of the store entries that the trash refers to."""
    column = removed_adapters.c.store_key
    return {key for key in connection.execute(select(column).where(column.is_not(None))).scalars() if key is not None}


def newest_version(connection: Connection, name: str) -> int:
    """Return the highest version of a name in the trash; 0 if there is none."""
    query = select(func.max(removed_adapters.c.version)).where(removed_adapters.c.name == name)
    return int(connection.execute(query).scalar() or 0)


def is_named(name: str, version: int | None) -> ColumnElement[bool]:
    """Return the condition that a row has this name, and this version if one is given."""
    named = removed_adapters.c.name == name
    return named if version is None else named & (removed_adapters.c.version == version)


def rows(connection: Connection, condition: ColumnElement[bool]) -> Sequence[RowMapping]:
    """Return the rows that satisfy a condition, sorted by name and version."""
    query = select(removed_adapters).where(condition)
    order = (removed_adapters.c.name, removed_adapters.c.version, removed_adapters.c.id)
    return connection.execute(query.order_by(*order)).mappings().all()


def removed(row: RowMapping) -> RemovedAdapter:
    """Return a row as a record."""
    entry = row["entry"] if isinstance(row["entry"], dict) else {}
    return RemovedAdapter(
        id=row["id"],
        name=row["name"],
        version=row["version"],
        sha256=row["sha256"],
        store_key=row["store_key"],
        size_bytes=entry["size_bytes"] if isinstance(entry.get("size_bytes"), int) else 0,
        kind=str(entry.get("kind")),
        removed_at=row["removed_at"],
        entry=entry,
    )
