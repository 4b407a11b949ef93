"""`loratool.verify`: check a merged model against its manifest, and replay its merge."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.checkpoint.model import Checkpoint
from loratool.errors import LoratoolError, NotFoundError, VerificationError, quoted
from loratool.library.merges.sources import find_adapters, find_base
from loratool.library.places.holding import hold
from loratool.library.recording.opening import open_registry
from loratool.library.reporting.progress import Progress, Silent
from loratool.library.resolving.resolve import resolve_merged
from loratool.merging.arithmetic import choose_device
from loratool.merging.delivery import Delivery
from loratool.merging.manifest import KINDS, Manifest, read_manifest
from loratool.merging.unmerge import (
    restore_by_undo,
)
from loratool.merging.verify import replay, replay_undo, verify_content
from registry import Registry


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The result of verifying a merged model.

    Attributes:
        path: the model's folder.
        fingerprint: of its content.
        tensors: number of tensors.
        files: number of other files that are as the manifest records them.
        replayed: how the merge was replayed: ``base``, ``undo``, or "" if neither was available.
        notes: notes for the user.
        delivery: how much of the update the stored numbers carry, in total; None if only whole parameters were replaced.
        deliveries: the same for each parameter, by name.
        edited: files that a user may change, such as a card or a chat template, and did.
        added: files that were added to the folder after the merge.
    """

    path: Path
    fingerprint: str
    tensors: int
    files: int
    replayed: str
    notes: tuple[str, ...]
    delivery: Delivery | None = None
    deliveries: Mapping[str, Delivery] = field(default_factory=dict)
    edited: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        return {
            "delivery": None if self.delivery is None else self.delivery.to_json(),
            "deliveries": {name: delivery.to_json() for name, delivery in self.deliveries.items()},
            "path": str(self.path),
            "output_fingerprint": self.fingerprint,
            "tensors": self.tensors,
            "files": self.files,
            "edited": list(self.edited),
            "added": list(self.added),
            "replayed": self.replayed,
            "notes": list(self.notes),
        }


def verify(
    merged: str | os.PathLike[str], *, registry: str | None = None, progress: Progress | None = None
) -> VerifyResult:
    """Check a merged or quantized model against its manifest, byte by byte, and replay it if base or undo is available.

    Args:
        merged: the model's folder, or its name if it is catalogued or the merge was recorded.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.
        progress: receives the number of bytes done.

    Raises:
        VerificationError: a tensor or file differs; the message names the first.
        LoratoolError, registry.RegistryError: the message says what is wrong.
    """
    watcher = progress or Silent()
    with open_registry(registry, read_only=True) as catalogue:
        path = resolve_merged(merged, catalogue)
        with hold(path, exclusive=False):
            manifest = read_manifest(path, KINDS)
            checkpoint = Checkpoint.open(path)
            watcher.begin("comparing with the manifest", checkpoint.nbytes)
            content = verify_content(checkpoint, manifest, progress=watcher.advance)
            replayed, notes = _replay(checkpoint, manifest, catalogue, watcher)
    return VerifyResult(
        path,
        manifest.fingerprint,
        len(manifest.tensors),
        content.files,
        replayed,
        (*(f"the file {quoted(name)} was added after the merge" for name in content.added), *notes),
        manifest.delivery_of_all,
        manifest.delivery,
        content.edited,
        content.added,
    )


def _replay(
    merged: Checkpoint, manifest: Manifest, catalogue: Registry, watcher: Progress
) -> tuple[str, tuple[str, ...]]:
    """Replay the merge from the base, or else undo it in memory by the undo file; return which was done, and notes."""
    why = _why_not_here(manifest)
    base = None if why else find_base(merged, manifest, catalogue, watcher)
    if base is not None:
        try:
            adapters = find_adapters(merged.folder, manifest, catalogue)
        except NotFoundError as error:
            return "", (f"the merge was not replayed: {error}",)
        changing = sum(merged.tensors[name].nbytes for name in manifest.changed)
        quantized = () if "dequantize" in manifest.options else manifest.delivery
        twice = sum(base.tensors[name].nbytes for name in quantized if name in base.tensors)
        watcher.begin(f"replaying the {manifest.kind}", base.nbytes + twice if manifest.converted else changing)
        try:
            differing = replay(base, manifest, adapters, progress=watcher.advance)
        except VerificationError as error:
            raise VerificationError(f"the {manifest.kind}, replayed, gives other bytes: {error}") from None
        if differing is None:
            return "base", ()
        why = f"the {manifest.kind}, replayed with another torch, gives other bytes in {quoted(differing)}"
    if manifest.undo is None:
        missing = "its base is not" if manifest.converted else "neither its base nor an undo file is"
        why = why or f"the {manifest.kind} was not replayed: {missing} available"
        return "", (f"{why}; every byte is what the {manifest.kind} wrote",)
    watcher.begin("taking the merge out in memory", sum(merged.tensors[name].nbytes for name in manifest.changed))
    replay_undo(manifest, restore_by_undo(merged, manifest), progress=watcher.advance)
    return "undo", (f"{why}; every byte is what the merge wrote",) if why else ()


def _why_not_here(manifest: Manifest) -> str | None:
    """Return why the merge cannot be replayed here (calibrated, or made on a missing device); None if it can."""
    if "calibration" in manifest.options:
        return "the merge was calibrated on a text, which is not kept, so it was not replayed from its base"
    device = manifest.options.get("device", "cpu")
    try:
        choose_device(device)
    except LoratoolError:
        return f"the merge was made on {quoted(device)}, which is not available, so it was not replayed from its base"
    return None
