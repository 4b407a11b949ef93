"""The catalogue of base models: `loratool.base_add`, `base_list`, `base_show`, `base_verify` and `base_remove`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from loratool.checkpoint.fingerprint import fingerprint, tensor_digests
from loratool.checkpoint.model import Checkpoint
from loratool.errors import VerificationError, quoted
from loratool.hub.address import repository_id
from loratool.library.places.holding import hold
from loratool.library.places.user_path import exists
from loratool.library.recording.new_base import look_at_base
from loratool.library.recording.opening import open_registry
from loratool.library.reporting.progress import Progress, Silent
from loratool.library.resolving.base_entry import base_entry
from loratool.library.resolving.hub_bases import is_away
from registry import AdapterSummary, BaseRecord, MergeRecord, check_name


@dataclass(frozen=True, slots=True)
class BaseShowResult:
    """The catalogue's record of one base: its entry, its adapters, and the merges into it."""

    record: BaseRecord
    adapters: tuple[AdapterSummary, ...]
    merges: tuple[MergeRecord, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        return {
            **base_json(self.record),
            "adapters": [adapter.reference for adapter in self.adapters],
            "merges": [{"output": str(merge.output), "state": merge.state} for merge in self.merges],
        }


def base_add(name: str, source: str | os.PathLike[str], *, variant_of: str | os.PathLike[str] | None = None,
             hub_id: str | None = None, download: bool = False, registry: str | None = None,
             progress: Progress | None = None) -> BaseRecord:  # fmt: skip
    """Catalogue a base model under `name`, with the fingerprint of its content. Its files stay where they are.

    A base on the Hub is catalogued from its headers and the Hub's facts. It is downloaded, checked and fingerprinted when its
    weights are first needed, or at once if they are in huggingface_hub's cache.

    Args:
        name: letters, digits, ``.``, ``_`` and ``-``, beginning with a letter or digit, 96 at most.
        source: its folder or safetensors file, or a Hub id (``owner/name`` or ``owner/name@revision``).
        variant_of: name, folder or Hub id of a catalogued base that is the same model, stored differently. A model on the
            Hub is downloaded to compare them.
        hub_id: the Hub model (``owner/name``) that the folder or file is a copy of. Pushed adapters name it.
        download: download a base on the Hub at once.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.
        progress: receives the number of bytes done.

    Raises:
        LoratoolError, registry.RegistryError: there is no model, another model has the name, or it is not such a variant.
    """
    _check_name(name)
    if hub_id is not None:
        hub_id = repository_id(hub_id)
    watcher = progress or Silent()
    with open_registry(registry) as catalogue:
        original = None if variant_of is None else base_entry(variant_of, catalogue, watcher)
        found = look_at_base(
            name, source, catalogue, hub_id=hub_id, download=download, original=original, watcher=watcher
        )
        return found.add(name, catalogue, variant_of=None if original is None else original.name)


def base_list(*, registry: str | None = None) -> tuple[BaseRecord, ...]:
    """Return the catalogued bases, sorted by name.

    Args:
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.

    Raises:
        registry.RegistryError: the catalogue cannot be read.
    """
    with open_registry(registry, read_only=True) as catalogue:
        return catalogue.bases.list()


def base_show(name: str | os.PathLike[str], *, registry: str | None = None) -> BaseShowResult:
    """Return everything that the catalogue knows about one base.

    Args:
        name: of the catalogued base; or its folder, or its Hub id.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.

    Raises:
        LoratoolError, registry.RegistryError: there is no such base; the nearest names are listed.
    """
    with open_registry(registry, read_only=True) as catalogue:
        record = base_entry(name, catalogue)
        merges = catalogue.merges.of_base(record.fingerprint) if record.fingerprint else ()
        return BaseShowResult(record, catalogue.adapters.list(base=record.name), merges)


def base_verify(
    name: str | os.PathLike[str], *, registry: str | None = None, progress: Progress | None = None
) -> BaseRecord:
    """Read every byte of a catalogued base, compare its fingerprint, and return its entry.

    Args:
        name: of the catalogued base; or its folder, or its Hub id.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.
        progress: receives the number of bytes done.

    Raises:
        VerificationError: the files have changed since they were catalogued, or are missing.
        LoratoolError, registry.RegistryError: there is no such base, or it is damaged.
    """
    watcher = progress or Silent()
    with open_registry(registry, read_only=True) as catalogue:
        record = base_entry(name, catalogue, by_content=False)
    name = record.name
    if is_away(record):
        raise VerificationError(
            f"base {quoted(name)} is not downloaded, so there are no bytes to verify; get them with "
            f"'loratool base add {name} {record.source} --download'"
        )
    if record.path is None or not exists(record.path):
        raise VerificationError(
            f"the files of base {quoted(name)} are no longer at {quoted(record.path)}; say where they are with "
            f"'loratool base add {name} FOLDER'"
        )
    with hold(record.path, exclusive=False):
        checkpoint = Checkpoint.open(record.path)
        watcher.begin("fingerprinting", checkpoint.nbytes)
        actual = fingerprint(checkpoint.tensors, tensor_digests(checkpoint, progress=watcher.advance))
    if actual != record.fingerprint:
        raise VerificationError(
            f"base {quoted(name)} at {quoted(record.path)} has changed since it was catalogued: expected "
            f"{str(record.fingerprint)[:12]}…, found {actual[:12]}…; restore it, or catalogue it under another name"
        )
    return record


def base_remove(name: str | os.PathLike[str], *, force: bool = False, registry: str | None = None) -> BaseRecord:
    """Remove a base from the catalogue and return its former entry. Its files stay.

    Args:
        name: of the catalogued base; or its folder, or its Hub id.
        force: remove it even if adapters belong to it. They keep its fingerprint.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.

    Raises:
        LoratoolError, registry.RegistryError: there is no such base, or adapters belong to it.
    """
    with open_registry(registry) as catalogue:
        return catalogue.bases.remove(base_entry(name, catalogue, by_content=False).name, force=force)


def base_json(record: BaseRecord) -> dict[str, Any]:
    """Return a base's entry for ``--json``, with the catalogue's columns as keys."""
    return {
        "name": record.name,
        "source": record.source,
        "revision": record.revision,
        "path": None if record.path is None else str(record.path),
        "downloaded": not is_away(record),
        "base_fingerprint": record.fingerprint,
        "variant_of": record.variant_of,
        "same_as": list(record.same_as),
        "architecture": record.architecture,
        "model_type": record.model_type,
        "parameter_count": record.parameter_count,
        "size_bytes": record.size_bytes,
        "dtype": record.dtype,
        "created_at": record.created_at.isoformat(),
    }


def _check_name(name: str) -> None:
    """Refuse an invalid name before the catalogue is opened and minutes are spent on the fingerprint."""
    check_name(name, "base")
