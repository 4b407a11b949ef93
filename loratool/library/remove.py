"""`loratool.remove`: move adapters to the trash."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from datetime import datetime, timedelta

from loratool.library.recording.opening import open_registry
from loratool.library.resolving.adapter_entry import adapter_entry
from registry import AdapterRecord, Registry, is_reference
from registry.trash import KEPT_DAYS


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovedRecord(AdapterRecord):
    """The entry of a removed adapter.

    Attributes:
        children: adapters that were made from it and still exist.
        kept_until: earliest time at which ``loratool doctor --gc`` frees its files; None if they were freed at once.
    """

    children: tuple[str, ...] = ()
    kept_until: datetime | None = None


def remove(adapter: str | os.PathLike[str], *, all_versions: bool = False, now: bool = False,
           registry: str | None = None) -> tuple[RemovedRecord, ...]:  # fmt: skip
    """Move an adapter from the catalogue to the trash, from which `restore` brings it back; return what was removed.

    ``loratool doctor --gc`` frees what has been in the trash for 30 days. Files outside the content store stay.

    Args:
        adapter: ``name@version``, ``name`` if there is only one version, or the path or Hub id of a catalogued adapter.
        all_versions: remove every version of ``name``.
        now: free the files at once, also those of an adapter that is in the trash already.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.

    Raises:
        registry.RegistryError: there is no such adapter, or it has several versions and none was chosen.
    """
    with open_registry(registry) as catalogue, catalogue.writing():
        named = os.fspath(adapter)
        name = named.partition("@")[0]
        is_known = is_reference(named) and (
            catalogue.adapters.versions(name) or (now and _is_in_trash(name, catalogue))
        )
        if not is_known:
            entry = adapter_entry(named, catalogue)
            named = entry.name if all_versions else entry.reference
        # Lineage refers to rows, so children must be found before the row is removed.
        kin = {
            record.id: _children(record, catalogue) for record in catalogue.adapters.versions(named.partition("@")[0])
        }
        removed = catalogue.adapters.remove(named, all_versions=all_versions, now=now)
        gone = {record.reference for record in removed}
        until = {each.reference: each.removed_at + timedelta(days=KEPT_DAYS) for each in catalogue.trash.list()}
        return tuple(
            RemovedRecord(
                **{field.name: getattr(record, field.name) for field in fields(record)},
                children=tuple(child for child in kin.get(record.id, ()) if child not in gone),
                kept_until=None if now else until.get(record.reference),
            )
            for record in removed
        )


def _children(record: AdapterRecord, catalogue: Registry) -> tuple[str, ...]:
    """Return the adapters that were made from this one, nearest first."""
    return tuple(dict.fromkeys(edge.child for edge in catalogue.lineage.descendants(record)))


def _is_in_trash(name: str, catalogue: Registry) -> bool:
    return any(each.name == name for each in catalogue.trash.list())
