"""Removing adapters into the trash and restoring them: `loratool.remove` and `restore`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta

from loratool.errors import NotFoundError, quoted
from loratool.library.adapter_entry import adapter_entry, weights_sha256
from loratool.library.opening import open_registry
from loratool.library.user_path import HUB_ID
from registry import AdapterRecord, Registry, RemovedAdapter, is_reference
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


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """A restored adapter, and its former reference `was`, which differs if another adapter has taken its version number."""

    record: AdapterRecord
    was: str


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


def restore(adapter: str | os.PathLike[str], *, all_versions: bool = False,
            registry: str | None = None) -> tuple[RestoreResult, ...]:  # fmt: skip
    """Restore an adapter from the trash with its name, version, tags, base, family and merges.

    Args:
        adapter: ``name@version``, ``name`` if the trash has only one version, or the path or Hub id of a removed adapter.
        all_versions: restore every version of ``name``.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.

    Raises:
        registry.RegistryError: it is not in the trash, or has several versions there and none was chosen.
    """
    named = os.fspath(adapter)
    with open_registry(registry) as catalogue, catalogue.writing():
        removed = catalogue.trash.list()
        if not is_reference(named):
            found = _of_place(named, removed)
            named = found.name if all_versions else found.reference
        name, _, version = named.partition("@")
        labels = [each.reference for each in sorted(removed, key=lambda each: (each.version, each.id))
                  if each.name == name and version in ("", str(each.version))]  # fmt: skip
        ids = catalogue.trash.restore(named, all_versions=all_versions)
        records = [catalogue.adapters.get(adapter_id) for adapter_id in ids]
        return tuple(
            RestoreResult(record, was) for record, was in zip(records, labels, strict=True) if record is not None
        )


def trash(*, registry: str | None = None) -> tuple[RemovedAdapter, ...]:
    """Return the adapters in the trash, last removed first.

    Raises:
        registry.RegistryError: the catalogue cannot be read.
    """
    with open_registry(registry, read_only=True) as catalogue:
        return catalogue.trash.list()


def _children(record: AdapterRecord, catalogue: Registry) -> tuple[str, ...]:
    """Return the adapters that were made from this one, nearest first."""
    return tuple(dict.fromkeys(edge.child for edge in catalogue.lineage.descendants(record)))


def _is_in_trash(name: str, catalogue: Registry) -> bool:
    return any(each.name == name for each in catalogue.trash.list())


def _of_place(place: str, removed: Sequence[RemovedAdapter]) -> RemovedAdapter:
    """Return the last removed adapter that has the weights of a file, or came from a repository on the Hub.

    Raises:
        NotFoundError: there is none.
    """
    digest = weights_sha256(place)
    repo = place.partition("@")[0].casefold() if HUB_ID.fullmatch(place) and digest is None else None
    for each in removed:
        repos = {str(location["repo"]).casefold() for location in each.entry.get("locations", ()) if location["repo"]}
        if each.sha256 == digest or repo in repos:
            return each
    raise NotFoundError(f"{quoted(place)} is not in the trash; 'loratool restore' lists the trash")
