"""Insertion of rows for adapters and bases from JSON that `registry.entries` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from registry.bases import find_base_id
from registry.database import inserted_id
from registry.entries import BASE, PLACE
from registry.entry_checks import Entry
from registry.errors import RegistryError
from registry.records import AdapterFacts
from registry.tables import adapters, bases, lineage, locations, merged_adapters, tags
from registry.trash_rows import newest_version


def enter(connection: Connection, entry: Entry, store_key: str | None) -> tuple[int, str]:
    """Insert a checked entry's rows, with the store's key of its files. Return its row id and reference.

    If its version is taken, it gets the next one. `relink` and `enter_parents` connect it to other adapters, once these exist.
    """
    taken = select(adapters.c.version).where(adapters.c.name == entry["name"])
    versions = set(connection.execute(taken).scalars())
    version = entry["version"]
    if version in versions:
        version = max(*versions, newest_version(connection, entry["name"])) + 1
    base_id, fingerprint = _base_of(connection, entry)
    facts = {name: entry.get(name) for name in AdapterFacts.__dataclass_fields__}
    row = insert(adapters).values(
        **facts
        | {
            "name": entry["name"],
            "version": version,
            "base_id": base_id,
            "base_fingerprint": fingerprint,
            "created_at": _moment(entry),
        }
    )
    adapter_id = inserted_id(connection.execute(row))
    if names := dict.fromkeys(entry["tags"]):
        connection.execute(insert(tags), [{"adapter_id": adapter_id, "tag": name} for name in names])
    places: list[dict[str, Any]] = [
        {name: place.get(name) for name in PLACE} | {"store_key": None} for place in entry["locations"]
    ]
    if store_key is not None:
        places.insert(0, dict.fromkeys(PLACE) | {"kind": "store", "store_key": store_key})
    for place in places:
        path = None if place["path"] is None else Path(place["path"])
        connection.execute(
            insert(locations).values(**place | {"path": path, "adapter_id": adapter_id, "created_at": _moment(entry)})
        )
    return adapter_id, f"{entry['name']}@{version}"


def _moment(entry: Entry) -> datetime:
    return datetime.fromisoformat(entry["created_at"])


def _base_of(connection: Connection, entry: Entry) -> tuple[int | None, str | None]:
    """Return the entry's base by name, or by fingerprint if another model has taken that name."""
    name, fingerprint = entry["base"], entry["base_fingerprint"]
    try:
        return find_base_id(connection, name, fingerprint)
    except RegistryError:
        return find_base_id(connection, None, fingerprint)


def label_of(entry: Entry) -> str:
    """Return the entry's `name@version`."""
    return f"{entry['name']}@{entry['version']}"


def relink(connection: Connection, adapter_id: int, label: str, sha256: str) -> None:
    """Connect an inserted adapter to the children and merges that record its `name@version` and sha256."""
    orphans = (lineage.c.parent_id.is_(None), lineage.c.parent == label, lineage.c.parent_sha256 == sha256)
    connection.execute(update(lineage).where(*orphans, lineage.c.child_id != adapter_id).values(parent_id=adapter_id))
    unknown = (
        merged_adapters.c.adapter_id.is_(None),
        merged_adapters.c.adapter == label,
        merged_adapters.c.sha256 == sha256,
    )
    connection.execute(update(merged_adapters).where(*unknown).values(adapter_id=adapter_id))


def enter_parents(connection: Connection, adapter_id: int, entry: Entry) -> None:
    """Insert the parents of an inserted adapter. A catalogued parent is found by its name and sha256."""
    for parent in entry["parents"]:
        parent_id = _parent_id(connection, parent)
        if parent_id is not None and (parent_id == adapter_id or _came_from(connection, parent_id, adapter_id)):
            parent_id = None
        connection.execute(
            insert(lineage).values(
                child_id=adapter_id,
                parent_id=parent_id,
                parent=parent["parent"],
                parent_sha256=parent["parent_sha256"],
                operation=parent["operation"],
                details=parent["details"],
                created_at=_moment(parent),
            )
        )


def _parent_id(connection: Connection, parent: Entry) -> int | None:
    name, _, version = parent["parent"].partition("@")
    if parent["parent_sha256"] is None or not version.isdecimal() or len(version) > 9:
        return None
    named = (adapters.c.name == name, adapters.c.version == int(version), adapters.c.sha256 == parent["parent_sha256"])
    return connection.execute(select(adapters.c.id).where(*named)).scalar()


def _came_from(connection: Connection, adapter_id: int, ancestor_id: int) -> bool:
    """Return whether `ancestor_id` is an ancestor of `adapter_id`. Labels from outside could form a circle."""
    generation, seen = {adapter_id}, {adapter_id}
    while generation:
        query = select(lineage.c.parent_id).where(lineage.c.child_id.in_(generation), lineage.c.parent_id.is_not(None))
        generation = set(connection.execute(query).scalars()) - seen
        seen |= generation
    return ancestor_id in seen


def enter_bases(connection: Connection, known: Sequence[Entry]) -> tuple[str, ...]:
    """Insert the checked bases whose names are free; return these names."""
    present = set(connection.execute(select(bases.c.name)).scalars())
    new = {entry["name"]: entry for entry in known if entry["name"] not in present}
    for entry in new.values():
        values = {name: entry.get(name) for name in BASE} | {"created_at": _moment(entry)}
        values["path"] = None if entry.get("path") is None else Path(entry["path"])
        connection.execute(insert(bases).values(**values))
    ids = dict(connection.execute(select(bases.c.name, func.coalesce(bases.c.variant_of, bases.c.id))).tuples().all())
    for entry in new.values():
        root = ids.get(entry.get("variant_of"))
        if root is not None and root != ids[entry["name"]]:
            connection.execute(update(bases).where(bases.c.name == entry["name"]).values(variant_of=root))
    return tuple(new)


def named_base(entry: Entry) -> Entry | None:
    """Return the base that an adapter's entry names, with the few known facts; None if it names none."""
    if entry["base"] is None:
        return None
    return dict.fromkeys((*BASE, "variant_of")) | {
        "name": entry["base"],
        "source": entry["base_source"] or entry["base_model"] or entry["base"],
        "fingerprint": entry["base_fingerprint"],
        "created_at": datetime.now(UTC).isoformat(),
    }
