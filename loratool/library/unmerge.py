"""`loratool.unmerge`: undo a merge."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.checkpoint.journal import refuse_links
from loratool.checkpoint.model import Checkpoint
from loratool.checkpoint.output_kind import OutputKind
from loratool.checkpoint.staging import refuse_existing
from loratool.errors import LoratoolError, RestoreError, quoted
from loratool.library.merges.sources import download_base_again, find_adapters, find_base
from loratool.library.places.holding import hold
from loratool.library.places.output_place import refuse_overlap
from loratool.library.places.user_path import user_path
from loratool.library.recording.opening import open_registry
from loratool.library.recording.promised import Promised, PromisedUnmerge
from loratool.library.reporting.progress import Progress, Silent
from loratool.library.resolving.resolve import resolve_merged
from loratool.merging.manifest import Manifest, read_manifest
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
    base = find_base(merged, manifest, catalogue, watcher)
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


def _ways(merged: Checkpoint, manifest: Manifest, catalogue: Registry, device: str, watcher: Progress, *,
          approximate: bool) -> list[Callable[[], Restoration]]:  # fmt: skip
    """Return the ways to restore the base, best first. Each raises RestoreError if something it needs is not available."""

    def from_base() -> Restoration:
        base = find_base(merged, manifest, catalogue, watcher)
        if base is None and download_base_again(manifest, catalogue, watcher):
            base = find_base(merged, manifest, catalogue, watcher)
        if base is None:
            name = f"{quoted(manifest.base_name)} ({manifest.base_fingerprint[:12]}…)"
            raise RestoreError(f"its base {name} is not available")
        return restore_from_base(merged, manifest, base)

    def approximately() -> Restoration:
        adapters = find_adapters(merged.folder, manifest, catalogue)
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
