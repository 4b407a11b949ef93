"""Rows of adapters and bases as JSON, for labels in the store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, select

from registry.damaged_rows import sound_parts
from registry.entry_checks import ROW_CHECKS
from registry.tables import adapters, bases, lineage, locations, tags

AT_ONCE = 500
"""Largest number of ids in one query."""

PLACE = ("kind", "path", "repo", "revision", "path_in_repo")
PARENT = ("parent", "parent_sha256", "operation", "details", "created_at")
BASE = tuple(column.name for column in bases.c if column.name not in ("id", "variant_of"))


def entries(connection: Connection, adapter_ids: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Return the adapters with these row ids as JSON, by id, with six queries for each `AT_ONCE` of them.

    Those with a damaged row are left out.
    """
    ids = sorted(set(adapter_ids))
    found: dict[int, dict[str, Any]] = {}
    for place in range(0, len(ids), AT_ONCE):
        parts, _ = sound_parts(ids[place : place + AT_ONCE], lambda some: _some_entries(connection, some))
        for part in parts:
            found |= {
                key: entry for key, entry in part.items() if all(ROW_CHECKS[name](entry[name]) for name in ROW_CHECKS)
            }
    return found


def _some_entries(connection: Connection, ids: Sequence[int]) -> dict[int, dict[str, Any]]:
    query = select(adapters, bases.c.name.label("base"), bases.c.source.label("base_source"))
    rows = connection.execute(
        query.select_from(adapters.outerjoin(bases, adapters.c.base_id == bases.c.id)).where(adapters.c.id.in_(ids))
    )
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        values = {key: _written(value) for key, value in row._mapping.items() if key not in ("id", "base_id")}
        found[row.id] = values | {"tags": [], "locations": [], "parents": []}
    for adapter_id, name in connection.execute(
        select(tags.c.adapter_id, tags.c.tag).where(tags.c.adapter_id.in_(ids)).order_by(tags.c.tag)
    ):
        found[adapter_id]["tags"].append(name)
    _append(connection, found, "locations", locations, locations.c.adapter_id, PLACE)
    for entry in found.values():
        entry["locations"] = [place for place in entry["locations"] if place["kind"] != "store"]
    _append(connection, found, "parents", lineage, lineage.c.child_id, PARENT)
    _call_by_their_names(connection, found)
    return found


def _call_by_their_names(connection: Connection, found: Mapping[int, dict[str, Any]]) -> None:
    """Replace former names of parents by their current ones."""
    query = select(lineage.c.child_id, lineage.c.parent, adapters.c.name, adapters.c.version).join(
        adapters, lineage.c.parent_id == adapters.c.id
    )
    for child_id, label, name, version in connection.execute(query.where(lineage.c.child_id.in_(found.keys()))):
        for parent in found[child_id]["parents"]:
            if parent["parent"] == label:
                parent["parent"] = f"{name}@{version}"


def _append(
    connection: Connection,
    found: Mapping[int, dict[str, Any]],
    word: str,
    table: Table,
    owner: Any,
    columns: Sequence[str],
) -> None:
    for row in connection.execute(table.select().where(owner.in_(found.keys())).order_by(table.c.id)):
        found[row._mapping[owner]][word].append({name: _written(row._mapping[name]) for name in columns})


def base_entries(connection: Connection) -> list[dict[str, Any]]:
    """Return all bases as JSON, each with the name of its `variant_of`."""
    root = bases.alias("root")
    query = select(bases, root.c.name.label("root")).select_from(bases.outerjoin(root, bases.c.variant_of == root.c.id))
    return [
        {name: _written(row._mapping[bases.c[name]]) for name in BASE} | {"variant_of": row.root}
        for row in connection.execute(query.order_by(bases.c.id))
    ]


def _written(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, Path) else value
