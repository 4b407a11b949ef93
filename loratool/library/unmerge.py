"""`loratool.unmerge` and `loratool.verify`: undo a merge, and check it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from loratool.checkpoint.fingerprint import fingerprint, tensor_digests
from loratool.checkpoint.journal import refuse_links
from loratool.checkpoint.model import Checkpoint
from loratool.checkpoint.output_kind import OutputKind
from loratool.checkpoint.staging import refuse_existing
from loratool.errors import LoratoolError, NotFoundError, RestoreError, VerificationError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.alpha import RANK, Alpha
from loratool.formats.read import read_adapter
from loratool.library.holding import hold
from loratool.library.home_folder import digest_cache
from loratool.library.hub_bases import is_away, obtain
from loratool.library.opening import open_registry
from loratool.library.output_place import refuse_overlap
from loratool.library.progress import Progress, Silent
from loratool.library.promised import Promised, PromisedUnmerge
from loratool.library.resolve import is_here, resolve_merged
from loratool.library.user_path import exists, user_path
from loratool.merging.arithmetic import choose_device
from loratool.merging.manifest import KINDS, Manifest, MergedAdapter, read_manifest
from loratool.merging.survival import Survival
from loratool.merging.undo import adapter_file
from loratool.merging.unmerge import (
    Restoration,
    UnmergeReport,
    copy_base_to,
    restore_approximately,
    restore_by_undo,
    restore_from_base,
    unmerge_in_place,
    unmerge_to,
)
from loratool.merging.verify import replay, replay_undo, verify_content
from registry import Registry, RegistryError


@dataclass(frozen=True, slots=True)
class UnmergeResult:
    """The result of an unmerge.

    Attributes:
        out: the restored model's folder.
        method: ``undo``, ``base`` or ``approximate``.
        fingerprint: of the restored base; None if it is not exact.
        inexact: names of tensors that differ from the base's: with ``approximate``, or if another program changed them.
        notes: notes for the user.
    """

    out: Path
    method: str
    fingerprint: str | None
    inexact: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        return {
            "out": str(self.out),
            "method": self.method,
            "base_fingerprint": self.fingerprint,
            "inexact": list(self.inexact),
            "notes": list(self.notes),
        }


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
        survival: for a merge into quantized matrices, the delivered share of the update in total.
        survivals: the same for each matrix, by name.
        edited: files that a user may change, such as a card or a chat template, and did.
        added: files that were added to the folder after the merge.
    """

    path: Path
    fingerprint: str
    tensors: int
    files: int
    replayed: str
    notes: tuple[str, ...]
    survival: Survival | None = None
    survivals: Mapping[str, Survival] = field(default_factory=dict)
    edited: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        return {
            "survival": None if self.survival is None else self.survival.to_json(),
            "survivals": {name: survival.to_json() for name, survival in self.survivals.items()},
            "path": str(self.path),
            "output_fingerprint": self.fingerprint,
            "tensors": self.tensors,
            "files": self.files,
            "edited": list(self.edited),
            "added": list(self.added),
            "replayed": self.replayed,
            "notes": list(self.notes),
        }


def unmerge(merged: str | os.PathLike[str], *, out: str | os.PathLike[str] | None = None, in_place: bool = False,
            approximate: bool = False, force: bool = False, device: str = "auto", registry: str | None = None,
            progress: Progress | None = None) -> UnmergeResult:  # fmt: skip
    """Undo the last merge of a merged model: by its undo file, or else from the base, found by its fingerprint.

    Args:
        merged: the merged model's folder, or its name if it is catalogued or the merge was recorded.
        out: the new folder; by default ``<merged>-unmerged`` beside it.
        in_place: restore the merged model's own files instead.
        approximate: if neither undo file nor base is available, subtract the update, with rounding errors in some elements.
        force: replace a merged model that loratool wrote.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.
        progress: receives the number of bytes done.

    Raises:
        VerificationError: a tensor has changed since the merge.
        RestoreError: the base cannot be restored bit for bit, and `approximate` is off.
        LoratoolError, registry.RegistryError: the message says what is wrong; nothing is written.
    """
    if in_place and out is not None:
        raise LoratoolError("a merge is taken out either in place or to --out; give one of them")
    watcher = progress or Silent()
    with open_registry(registry, read_only=True) as catalogue:
        path = resolve_merged(merged, catalogue)
        target = (
            path if in_place else user_path(out) if out else path.resolve().parent / f"{path.resolve().name}-unmerged"
        )
        with hold(path, exclusive=in_place):
            manifest = read_manifest(path)
            checkpoint = Checkpoint.open(path)
            if manifest.converted:
                _refuse_arithmetic(path, in_place=in_place, approximate=approximate)
            if in_place:
                refuse_links(path, [header.file for header in checkpoint.headers])
            else:
                refuse_overlap(target, [path])
                refuse_existing(target, OutputKind.MERGED_MODEL, force=force)
            if manifest.converted:
                return _copied_base(checkpoint, manifest, catalogue, target, watcher, force=force)

            def take_out(way: Restoration) -> UnmergeReport:
                if in_place:
                    watcher.begin("unmerging", sum(target.nbytes for target in way.targets))
                    return unmerge_in_place(checkpoint, manifest, way, progress=watcher.advance)
                watcher.begin("unmerging", sum(header.size for header in checkpoint.headers))
                return unmerge_to(checkpoint, manifest, way, target, force=force, progress=watcher.advance)

            ways = _ways(checkpoint, manifest, catalogue, device, watcher, approximate=approximate)
            if not in_place:
                report, notes = _by_the_first_that_works(ways, take_out, checkpoint, manifest)
            else:
                with Promised(PromisedUnmerge.of(path, manifest.fingerprint), catalogue) as promised:
                    report, notes = _by_the_first_that_works(ways, take_out, checkpoint, manifest)
                    notes += _record_unmerged(path, manifest, catalogue, promised)
    restored = None if report.inexact else manifest.base_fingerprint
    return UnmergeResult(target, report.method, restored, report.inexact, (*notes, *report.notes))


def _record_unmerged(path: Path, manifest: Manifest, catalogue: Registry, promised: Promised) -> list[str]:
    """Record an unmerge in place. Since it is done, a catalogue that cannot be written gives only a note."""
    try:
        with catalogue.for_writing() as writable:
            for record in writable.merges.of_output(path.absolute()):
                if record.output_fingerprint == manifest.fingerprint and record.state in ("merged", "gone"):
                    writable.merges.set_state(record.id, "unmerged")
    except RegistryError as error:
        promised.postpone(error)
        return [f"the merge is taken out, and the catalogue does not know of it: {error}"]
    return []


def _refuse_arithmetic(path: Path, *, in_place: bool, approximate: bool) -> None:
    """Raise RestoreError if an option asks to restore a base from a model that is stored differently."""
    option = "--in-place" if in_place else "--approximate" if approximate else None
    if option:
        raise RestoreError(
            f"{quoted(path)} is stored differently than its base, so the base can only be restored as a copy of itself; leave "
            f"{option} out"
        )


def _copied_base(merged: Checkpoint, manifest: Manifest, catalogue: Registry, out: Path, watcher: Progress, *,
                 force: bool) -> UnmergeResult:  # fmt: skip
    """Restore the base of a model that is stored differently, by copying the base.

    Raises:
        RestoreError: the base is not available.
    """
    base = _find_base(merged, manifest, catalogue, watcher)
    if base is None:
        raise RestoreError(
            f"{quoted(merged.path)} is stored differently than its base {quoted(manifest.base_name)} "
            f"({manifest.base_fingerprint[:12]}…), and holds nothing to restore it from; put the base back to "
            f"{quoted(manifest.base_path)}, or catalogue it with 'loratool base add'"
        )
    refuse_overlap(out, [base.path])
    watcher.begin("copying the base", sum(header.size for header in base.headers))
    with hold(base.path, exclusive=False):
        report = copy_base_to(base, manifest, out, force=force, progress=watcher.advance)
    return UnmergeResult(out, report.method, manifest.base_fingerprint, report.inexact, report.notes)


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
        manifest.survival_of_all,
        manifest.survival,
        content.edited,
        content.added,
    )


def _ways(merged: Checkpoint, manifest: Manifest, catalogue: Registry, device: str, watcher: Progress, *,
          approximate: bool) -> list[Callable[[], Restoration]]:  # fmt: skip
    """Return the ways to restore the base, best first. Each raises RestoreError if something it needs is not available."""

    def from_base() -> Restoration:
        base = _find_base(merged, manifest, catalogue, watcher)
        if base is None and _downloaded(manifest, catalogue, watcher):
            base = _find_base(merged, manifest, catalogue, watcher)
        if base is None:
            name = f"{quoted(manifest.base_name)} ({manifest.base_fingerprint[:12]}…)"
            raise RestoreError(f"its base {name} is not available")
        return restore_from_base(merged, manifest, base)

    def approximately() -> Restoration:
        adapters = _find_adapters(merged.folder, manifest, catalogue)
        return restore_approximately(merged, manifest, adapters, device)

    exact = [lambda: restore_by_undo(merged, manifest, device), from_base]
    return [*exact, approximately] if approximate else exact


def _by_the_first_that_works(ways: Sequence[Callable[[], Restoration]], take_out: Callable[[Restoration], UnmergeReport],
                             merged: Checkpoint, manifest: Manifest) -> tuple[UnmergeReport, list[str]]:  # fmt: skip
    """Undo the merge; return the report, and notes on the ways that failed before."""
    reasons: list[str] = []
    for way in ways:
        try:
            report = take_out(way())
        except RestoreError as error:
            reasons.append(str(error))
        else:
            return report, reasons if manifest.undo or report.inexact else []
    raise RestoreError(
        f"{quoted(merged.path)} cannot be restored bit for bit: {'; '.join(reasons)}. Catalogue the base with "
        "'loratool base add', or give --approximate to subtract the update, off by a rounding here and there"
    )


def _find_base(merged: Checkpoint, manifest: Manifest, catalogue: Registry, watcher: Progress) -> Checkpoint | None:
    """Find the base by its fingerprint, at its catalogued path or else at the path that the manifest records.

    The folder is locked while it is read, which first finishes an interrupted change in place.
    """
    known = [record.path for record in catalogue.bases.find_by_fingerprint(manifest.base_fingerprint)]
    for path in [*known, Path(manifest.base_path)]:
        if path is None or not exists(path) or merged.folder.resolve() in (path.resolve(), path.resolve().parent):
            continue
        try:
            with hold(path, exclusive=False):
                checkpoint = Checkpoint.open(path)
                watcher.begin("fingerprinting the base", checkpoint.nbytes)
                digests = tensor_digests(checkpoint, digest_cache(), progress=watcher.advance)
        except LoratoolError:
            continue
        if fingerprint(checkpoint.tensors, digests) == manifest.base_fingerprint:
            return checkpoint
    return None


def _downloaded(manifest: Manifest, catalogue: Registry, watcher: Progress) -> bool:
    """Download the base again if it is catalogued from the Hub; return whether it was downloaded."""
    for record in catalogue.bases.find_by_fingerprint(manifest.base_fingerprint):
        if is_away(record):
            obtain(record, catalogue, watcher)
            return True
    return False


def _find_adapters(folder: Path, manifest: Manifest, catalogue: Registry) -> list[Adapter]:
    return [_find_adapter(index, entry, folder, manifest, catalogue) for index, entry in enumerate(manifest.adapters)]


def _find_adapter(index: int, entry: MergedAdapter, folder: Path, manifest: Manifest, catalogue: Registry) -> Adapter:
    """Find an adapter of the merge by its sha256: beside the undo file, in the catalogue or its trash, or at its old path."""
    if manifest.undo is not None:
        kept = _readable(folder / manifest.undo / adapter_file(index))
        if kept is not None and kept.sha256 in (manifest.undo_adapters[index : index + 1] or (kept.sha256,)):
            return kept
    known = catalogue.adapters.find_by_sha256(entry.sha256)
    places = [catalogue.adapters.files(record) for record in known if is_here(record, catalogue)]
    trashed = [catalogue.trash.files(each) for each in catalogue.trash.list(sha256=entry.sha256)]
    alphas: tuple[Alpha | None, ...] = (None, entry.alpha, RANK)
    for place, alpha in product([*places, *filter(None, trashed), Path(entry.file)], alphas):
        adapter = _readable(place, alpha)
        if adapter is not None and entry.is_it(adapter):
            return adapter
    raise NotFoundError(
        f"the adapter {quoted(entry.name)} (sha256 {entry.sha256[:12]}…) is neither in the catalogue nor at "
        f"{quoted(entry.file)}; catalogue it with 'loratool add'"
    )


def _readable(place: Path, alpha: Alpha | None = None) -> Adapter | None:
    """Return the adapter at `place`, read with the given alpha; None if it cannot be read."""
    try:
        return read_adapter(place, alpha) if exists(place) else None
    except LoratoolError:
        return None


def _replay(
    merged: Checkpoint, manifest: Manifest, catalogue: Registry, watcher: Progress
) -> tuple[str, tuple[str, ...]]:
    """Replay the merge from the base, or else undo it in memory by the undo file; return which was done, and notes."""
    why = _why_not_here(manifest)
    base = None if why else _find_base(merged, manifest, catalogue, watcher)
    if base is not None:
        try:
            adapters = _find_adapters(merged.folder, manifest, catalogue)
        except NotFoundError as error:
            return "", (f"the merge was not replayed: {error}",)
        changing = sum(merged.tensors[name].nbytes for name in manifest.changed)
        twice = sum(base.tensors[name].nbytes for name in manifest.survival if name in base.tensors)
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
