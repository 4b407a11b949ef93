"""The family tree of adapters: which adapter was made from which, and by what operation."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Select, insert, select

from registry.damaged_rows import rows_less
from registry.database import Database
from registry.errors import RegistryError
from registry.labels import Labels
from registry.names import printable
from registry.records import AdapterRecord, LineageRecord
from registry.tables import adapters, lineage

_child = adapters.alias("child")
_parent = adapters.alias("parent_adapter")
_edges = (
    select(
        lineage,
        _child.c.name.label("child_name"),
        _child.c.version.label("child_version"),
        _parent.c.name.label("parent_name"),
        _parent.c.version.label("parent_version"),
    )
    .join(_child, lineage.c.child_id == _child.c.id)
    .outerjoin(_parent, lineage.c.parent_id == _parent.c.id)
)


class Lineage:
    """The family tree of one catalogue's adapters."""

    def __init__(self, database: Database, labels: Labels) -> None:
        self._database = database
        self._labels = labels

    def record(
        self,
        child: AdapterRecord,
        parent: AdapterRecord | str,
        operation: str,
        *,
        parent_sha256: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> LineageRecord:
        """Record that `child` was made from `parent` by `operation` (`truncate`, `combine`, ...), unless that is recorded.

        A parent that is not in the catalogue is given by a label, such as a file's name, and its sha256.

        Raises RegistryError if the parent was made from the child.
        """
        known = isinstance(parent, AdapterRecord)
        values: dict[str, Any] = {
            "child_id": child.id,
            "parent_id": parent.id if isinstance(parent, AdapterRecord) else None,
            "parent": parent.reference if isinstance(parent, AdapterRecord) else printable(parent),
            "parent_sha256": parent.sha256 if isinstance(parent, AdapterRecord) else parent_sha256,
            "operation": operation,
        }
        with self._database.writing() as connection:
            ancestors = _walk(connection, values["parent_id"], up=True) if known else ()
            if values["parent_id"] == child.id or any(edge.parent_id == child.id for edge in ancestors):
                raise RegistryError(
                    f"{values['parent']} was itself made from {child.reference}; give the result another name with --name"
                )
            same = [lineage.c[name].is_not_distinct_from(value) for name, value in values.items()]
            rows = _read(connection, _edges.where(*same))
            if not rows:
                plain = None if details is None else dict(details)
                connection.execute(insert(lineage).values(**values, details=plain, created_at=datetime.now(UTC)))
                rows = _read(connection, _edges.where(*same))
                self._labels.touch(connection, [child.id])
            return _record(rows[0])

    def parents(self, adapter: AdapterRecord) -> tuple[LineageRecord, ...]:
        """Return the adapter's direct parents."""
        with self._database.reading() as connection:
            return _next(connection, {adapter.id}, up=True)

    def ancestors(self, adapter: AdapterRecord) -> tuple[LineageRecord, ...]:
        """Return all ancestors of the adapter, nearest first, one record per edge of the tree."""
        with self._database.reading() as connection:
            return _walk(connection, adapter.id, up=True)

    def descendants(self, adapter: AdapterRecord) -> tuple[LineageRecord, ...]:
        """Return all descendants of the adapter, nearest first, one record per edge of the tree."""
        with self._database.reading() as connection:
            return _walk(connection, adapter.id, up=False)


def _walk(connection: Connection, adapter_id: int, *, up: bool) -> tuple[LineageRecord, ...]:
    """Return the edges that can be reached from an adapter, with one query per generation."""
    edges: list[LineageRecord] = []
    seen, generation = {adapter_id}, {adapter_id}
    while generation:
        found = _next(connection, generation, up=up)
        edges.extend(found)
        reached = {edge.parent_id if up else edge.child_id for edge in found}
        generation = {other for other in reached if other is not None} - seen
        seen |= generation
    return tuple(edges)


def _next(connection: Connection, ids: Collection[int], *, up: bool) -> tuple[LineageRecord, ...]:
    column = lineage.c.child_id if up else lineage.c.parent_id
    return tuple(_record(row) for row in _read(connection, _edges.where(column.in_(ids)).order_by(lineage.c.id)))


def _read(connection: Connection, query: Select[Any]) -> list[Mapping[str, Any]]:
    return rows_less(connection, query, lineage.c.details, lambda row: f"the lineage of {_child_of(row)}")


def _child_of(row: Mapping[str, Any]) -> str:
    return f"{row['child_name']}@{row['child_version']}"


def _record(row: Mapping[str, Any]) -> LineageRecord:
    return LineageRecord(
        child_id=row["child_id"],
        child=_child_of(row),
        parent_id=row["parent_id"],
        parent=row["parent"] if row["parent_name"] is None else f"{row['parent_name']}@{row['parent_version']}",
        parent_sha256=row["parent_sha256"],
        operation=row["operation"],
        details=row["details"],
        created_at=row["created_at"],
    )
