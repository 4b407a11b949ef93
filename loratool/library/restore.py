"""`loratool.restore`: bring adapters back from the trash."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from loratool.errors import NotFoundError, quoted
from loratool.library.places.user_path import HUB_ID
from loratool.library.recording.opening import open_registry
from loratool.library.resolving.adapter_entry import weights_sha256
from registry import AdapterRecord, RemovedAdapter, is_reference


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """A restored adapter, and its former reference `was`, which differs if another adapter has taken its version number."""

    record: AdapterRecord
    was: str


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
