"""`loratool.show`: everything that is known about one adapter."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, TypedDict

from loratool.errors import LoratoolError
from loratool.formats.adapter import Adapter
from loratool.formats.alpha import Alpha
from loratool.formats.identity import AnyAdapter
from loratool.formats.no_change import why_no_change
from loratool.formats.trained_beside import trained_beside
from loratool.library.checking.commands_for import commands_for
from loratool.library.recording.base_of_adapter import recorded_base_of
from loratool.library.recording.new_adapter import facts_from
from loratool.library.recording.opening import open_registry
from loratool.library.reporting.adapter_json import adapter_json
from loratool.library.resolving.adapter_entry import find_adapter_entry
from loratool.library.resolving.resolve import FoundAdapter, adapter_of_entry, find_adapter
from loratool.merging.delivery import Delivery
from registry import AdapterRecord, BaseRecord, LineageRecord, MergeRecord, Registry, RegistryError


@dataclass(frozen=True, slots=True)
class ShowResult:
    """Everything that is known about one adapter.

    Attributes:
        record: its entry; for an uncatalogued adapter one without a version (0).
        base: its catalogued base.
        versions: all versions of its name.
        ancestors: lineage up to the first ancestors.
        descendants: lineage down to the last descendants.
        merges: merges of it.
        place: file or Hub id of an uncatalogued adapter; None for a catalogued one.
        changes_nothing: why it changes nothing in any base, if so and if its files are on this disk.
        trained_beside: files with weights that were trained with it but are not part of it.
        why_not: why loratool does not compute it, if so.
        commands: for each command, whether it works on the adapter (`commands_for`).
    """

    record: AdapterRecord
    base: BaseRecord | None
    versions: tuple[AdapterRecord, ...]
    ancestors: tuple[LineageRecord, ...]
    descendants: tuple[LineageRecord, ...]
    merges: tuple[MergeRecord, ...]
    place: str | None = None
    changes_nothing: str | None = None
    trained_beside: tuple[str, ...] = ()
    why_not: str | None = None
    commands: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        parent = next((edge for edge in self.ancestors if edge.child_id == self.record.id), None)
        return {
            **adapter_json(self.record),
            **({} if self.place is None else {"version": None, "created_at": None}),
            "catalogued": self.place is None,
            "changes_nothing": self.changes_nothing,
            "trained_beside": list(self.trained_beside),
            "commands": dict(self.commands),
            "parent": parent.parent if parent else None,
            "parent_sha256": parent.parent_sha256 if parent else None,
            "versions": [record.version for record in self.versions],
            "ancestors": [_edge_json(edge) for edge in self.ancestors],
            "descendants": [_edge_json(edge) for edge in self.descendants],
            "hub": [
                {"repo": place.repo, "revision": place.revision, "path_in_repo": place.path_in_repo}
                for place in self.record.locations
                if place.repo
            ],
            "merges": [_merge_json(merge) for merge in self.merges],
        }


def _merge_json(merge: MergeRecord) -> dict[str, Any]:
    delivery = delivery_of(merge)
    return {
        "output": str(merge.output),
        "base": merge.base,
        "state": merge.state,
        "created_at": merge.created_at.isoformat(),
        "delivery": None if delivery is None else delivery.to_json(),
    }


def delivery_of(merge: MergeRecord) -> Delivery | None:
    """Return what a merge delivered of the update, or None if the catalogue has no record of it."""
    options = merge.options or {}
    try:
        return Delivery.from_json(options.get("delivery") or options["survival"])  # its name in earlier versions
    except (KeyError, TypeError, ValueError):
        return None


def show(adapter: str | os.PathLike[str], *, alpha: Alpha | None = None, registry: str | None = None) -> ShowResult:
    """Return everything that is known about one adapter, from the catalogue or else from its files.

    Args:
        adapter: ``name``, ``name@version``, a path or a Hub id.
        alpha: alpha of an uncatalogued bare file that does not state it: a number, or ``rank`` for each module's rank.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.

    Raises:
        LoratoolError, registry.RegistryError: there is no such adapter; the nearest names are listed.
    """
    with open_registry(registry, read_only=True) as catalogue:
        record = find_adapter_entry(os.fspath(adapter), catalogue)
        if record is None:
            return _uncatalogued(find_adapter(adapter, catalogue, alpha), catalogue)
        return ShowResult(
            record=record,
            base=catalogue.bases.get(record.base) if record.base else None,
            versions=catalogue.adapters.versions(record.name),
            ancestors=catalogue.lineage.ancestors(record),
            descendants=catalogue.lineage.descendants(record),
            merges=catalogue.merges.of_adapter(record),
            **_of_files(_read_again(record, catalogue)),
        )


def _read_again(record: AdapterRecord, catalogue: Registry) -> AnyAdapter | str:
    """Read a catalogued adapter's files; if they cannot be read, return why."""
    try:
        return adapter_of_entry(record, catalogue)
    except (LoratoolError, RegistryError, OSError) as error:
        return str(error)


class _OfFiles(TypedDict):
    changes_nothing: str | None
    trained_beside: tuple[str, ...]
    why_not: str | None
    commands: Mapping[str, str]


def _of_files(adapter: AnyAdapter | str) -> _OfFiles:
    """Return the facts that only the files of an adapter give. `adapter` is the reason if they cannot be read."""
    commands = commands_for(adapter)
    if isinstance(adapter, str):
        return {"changes_nothing": None, "trained_beside": (), "why_not": None, "commands": commands}
    beside = trained_beside(adapter)
    if not isinstance(adapter, Adapter):
        return {"changes_nothing": None, "trained_beside": beside, "why_not": adapter.why_not, "commands": commands}
    try:
        reason = why_no_change(adapter)
    except (LoratoolError, OSError):
        reason = None
    return {"changes_nothing": reason, "trained_beside": beside, "why_not": None, "commands": commands}


def _uncatalogued(found: FoundAdapter, catalogue: Registry) -> ShowResult:
    """Return the result for an uncatalogued adapter, from its files."""
    adapter = found.adapter
    owner = recorded_base_of(adapter, catalogue)
    facts = facts_from(adapter, owner)
    record = AdapterRecord(
        id=0,
        name=adapter.name,
        version=0,
        base=owner.name if owner else None,
        tags=(),
        created_at=datetime.fromtimestamp(adapter.file.stat().st_mtime, UTC),
        locations=(),
        **{column.name: getattr(facts, column.name) for column in fields(facts)},
    )
    place = found.hub_id or str(adapter.file)
    return ShowResult(record, owner, (), (), (), (), place=place, **_of_files(adapter))


def _edge_json(edge: LineageRecord) -> dict[str, Any]:
    return {
        "child": edge.child,
        "parent": edge.parent,
        "parent_sha256": edge.parent_sha256,
        "operation": edge.operation,
        "details": edge.details,
    }
