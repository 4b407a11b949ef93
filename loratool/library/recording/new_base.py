"""New entries of bases: a folder, a file or a Hub id, examined and fingerprinted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.checkpoint.fingerprint import fingerprint, tensor_digests
from loratool.checkpoint.header import TensorInfo
from loratool.checkpoint.model import Checkpoint
from loratool.errors import CheckpointError, NotFoundError, WrongBaseError, quoted
from loratool.hub.address import HubAddress
from loratool.library.places.holding import hold
from loratool.library.places.home_folder import digest_cache
from loratool.library.places.user_path import HUB_ID, exists, taken_for_hub_id, user_path
from loratool.library.recording.model_entry import facts_of_model
from loratool.library.reporting.progress import Progress
from loratool.library.resolving.hub_bases import HubBase, find_hub_base
from registry import BaseRecord, Registry


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
