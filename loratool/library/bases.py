"""The catalogue of base models: `loratool.base_add`, `base_list`, `base_show`, `base_verify` and `base_remove`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.checkpoint.fingerprint import fingerprint, tensor_digests
from loratool.checkpoint.header import TensorInfo
from loratool.checkpoint.model import Checkpoint
from loratool.errors import CheckpointError, NotFoundError, VerificationError, WrongBaseError, quoted
from loratool.hub.address import HubAddress, repository_id
from loratool.library.base_entry import base_entry
from loratool.library.holding import hold
from loratool.library.home_folder import digest_cache
from loratool.library.hub_bases import HubBase, find_hub_base, is_away
from loratool.library.model_entry import facts_of_model
from loratool.library.opening import open_registry
from loratool.library.progress import Progress, Silent
from loratool.library.user_path import HUB_ID, exists, taken_for_hub_id, user_path
from registry import AdapterSummary, BaseRecord, MergeRecord, Registry, check_name


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


@dataclass(frozen=True, slots=True)
class NewBase:
    """A base model that was examined but is not catalogued yet.

    Attributes:
        source: its Hub id, or else its folder or file.
        checkpoint: its headers.
        path: its folder or file; None if it is on the Hub and not downloaded.
        fingerprint: of its content; None if `path` is None.
        on_hub: its commit on the Hub, and the Hub's facts about its weight files.
    """

    source: str
    checkpoint: Checkpoint
    path: Path | None = None
    fingerprint: str | None = None
    on_hub: Mapping[str, Any] = field(default_factory=dict)

    def add(self, name: str, catalogue: Registry, *, variant_of: str | None = None) -> BaseRecord:
        """Catalogue it under `name`.

        Raises:
            registry.RegistryError: another model has the name, or the catalogue cannot be written.
        """
        return catalogue.bases.add(
            name,
            self.source,
            path=self.path,
            fingerprint=self.fingerprint,
            variant_of=variant_of,
            facts=facts_of_model(self.checkpoint),
            **self.on_hub,
        )


def look_at_base(name: str, source: str | os.PathLike[str], catalogue: Registry, *, watcher: Progress,
                 hub_id: str | None = None, download: bool = False, original: BaseRecord | None = None) -> NewBase:  # fmt: skip
    """Read the model in a folder or at a Hub id, and fingerprint it if its weights are on this disk.

    `name` is its future name; `original` is the base that it must be a variant of, if any.

    Raises:
        LoratoolError: there is no model, it cannot be downloaded, or it is not a variant of `original`.
    """
    text = os.fspath(source)
    path, base = user_path(text), None
    if text and exists(path):
        path = Path(os.path.abspath(path))
        text = hub_id or str(path)
    elif hub_id is not None:
        raise NotFoundError(f"there is no model at {quoted(text)}; --hub-id is for a folder or file of yours")
    elif HUB_ID.fullmatch(text):
        with taken_for_hub_id(text):
            base = _find_on_hub(name, text, catalogue)
        text = base.snapshot.repo
        if not (download or original or base.is_here) and base.can_wait:
            headers = base.headers()
            _refuse_adapter(headers)
            return NewBase(text, headers, on_hub=_place_on_hub(base))
        path = base.download(watcher, recheck=download)
    else:
        raise NotFoundError(f"there is no model at {quoted(text)}; give its folder, its safetensors file or a Hub id")
    with hold(path, exclusive=False):
        checkpoint = Checkpoint.open(path)
        _refuse_adapter(checkpoint)
        if original is not None:
            _refuse_other_model(checkpoint, original)
        watcher.begin("fingerprinting", checkpoint.nbytes)
        digests = tensor_digests(checkpoint, digest_cache(), progress=watcher.advance)
    return NewBase(
        text,
        checkpoint,
        path,
        fingerprint(checkpoint.tensors, digests),
        {} if base is None else _place_on_hub(base),
    )


def _find_on_hub(name: str, hub_id: str, catalogue: Registry) -> HubBase:
    """Find the base at a Hub id. If it is already catalogued under `name`, use the catalogued commit."""
    address = HubAddress.parse(hub_id)
    known = catalogue.bases.get(name)
    if known is not None and known.source == address.repo and address.revision is None:
        address = address.at(known.revision)
    return find_hub_base(address, f"loratool base add {name} {hub_id}")


def _place_on_hub(base: HubBase) -> dict[str, Any]:
    files = base.weights.to_json() if base.can_wait else None
    return {"revision": base.snapshot.commit, "files": files}


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


def _refuse_adapter(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if all tensors are factors of a LoRA."""
    if all(".lora_" in name for name in checkpoint.tensors):
        raise CheckpointError(
            f"{quoted(checkpoint.path)} is an adapter, not a base model; catalogue it with 'loratool add' instead"
        )


def _refuse_other_model(checkpoint: Checkpoint, original: BaseRecord) -> None:
    """Raise WrongBaseError unless both have tensors of equal names and shapes, with equal bytes where the storage is equal."""
    label = quoted(original.name)
    if original.path is None or not exists(original.path):
        raise WrongBaseError(f"the files of base {label} are needed to compare, and are not there; add it again first")
    other = Checkpoint.open(original.path)
    ours, theirs = _plain_tensors(checkpoint), _plain_tensors(other)
    for name in sorted(ours.keys() ^ theirs.keys()):
        raise WrongBaseError(
            f"{quoted(checkpoint.path)} is not a variant of {label}: only one of them has {quoted(name)}; leave --variant-of out"
        )
    packed = {name for name in ours if f"{name}.absmax" in checkpoint.tensors or f"{name}.absmax" in other.tensors}
    for name in sorted(ours.keys() - packed):
        if ours[name].shape != theirs[name].shape:
            raise WrongBaseError(
                f"{quoted(checkpoint.path)} is not a variant of {label}: {quoted(name)} is {list(ours[name].shape)} here and "
                f"{list(theirs[name].shape)} there; leave --variant-of out"
            )
    digests, expected = tensor_digests(checkpoint, digest_cache()), tensor_digests(other, digest_cache())
    for name in sorted(ours):
        if ours[name].dtype == theirs[name].dtype and name not in packed and digests[name] != expected[name]:
            raise WrongBaseError(
                f"{quoted(checkpoint.path)} is not a variant of {label}: {quoted(name)} has other values; leave --variant-of out"
            )


def _plain_tensors(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """Return the tensors that are whole parameters, not parts of a quantized one."""
    names = checkpoint.tensors
    return {name: info for name, info in names.items() if name.rpartition(".weight.")[0] + ".weight" not in names}
