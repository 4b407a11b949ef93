"""Take a merge out again: with its undo file, from the base, or approximately by arithmetic."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.checkpoint.blocks import read_exactly, row_blocks
from loratool.checkpoint.file_state import refuse_changed_meanwhile, states_of
from loratool.checkpoint.fingerprint import file_digest, fingerprint, hash_tensor, tensor_digests
from loratool.checkpoint.inheritance import inherited_files
from loratool.checkpoint.journal import Journal
from loratool.checkpoint.model import Checkpoint, has_file
from loratool.checkpoint.model_copy import model_copy
from loratool.checkpoint.output_kind import OutputKind
from loratool.checkpoint.staging import staged_folder
from loratool.checkpoint.threads import in_threads
from loratool.errors import (
    AdapterError,
    CheckpointError,
    LoratoolError,
    OutputError,
    RestoreError,
    VerificationError,
    quoted,
)
from loratool.formats.adapter import Adapter
from loratool.formats.read import read_adapter
from loratool.merging.apply import places_in, reserve
from loratool.merging.arithmetic import ApproximateUnmerge, ExactUnmerge, choose_device
from loratool.merging.changed_files import KEPT, Originals, edited_since
from loratool.merging.manifest import MANIFEST_NAME, Manifest
from loratool.merging.plan import Target, WeightedAdapter, plan_merge
from loratool.merging.stream import Change, Digests, Progress, bytes_of, opened, stream
from loratool.merging.undo import UNDO_NAME, UndoFile, adapter_file
from loratool.merging.untied import NewWeights, heads_of, kept_heads, tied_files, untied_as
from loratool.merging.workers import cpu_workers
from loratool.weights.storages import parameter_name, stored_weight
from loratool.weights.stored import StoredWeight

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Restoration:
    """A way back to the base: the change for each changed matrix.

    `method` is ``undo``, ``base`` or ``approximate``. The first two must give the base's bytes, which is checked.
    """

    method: str
    targets: tuple[Target, ...]
    change: Callable[[Target], Change]
    originals: Originals = field(default_factory=lambda: Originals(None))
    heads: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        return self.method != "approximate"


@dataclass(frozen=True, slots=True)
class UnmergeReport:
    """How a merge was taken out: the method, and the names of the tensors that differ from the base's."""

    method: str
    inexact: tuple[str, ...]
    notes: tuple[str, ...]


def restore_by_undo(merged: Checkpoint, manifest: Manifest, device: str = "auto") -> Restoration:
    """Return the way back through the undo file, which needs only the merged model's folder.

    Raises:
        RestoreError: the manifest names no undo file; or it or an adapter beside it is missing, damaged or from another
          merge. The returned changes raise it too, for damage that shows only when the numbers are read.
    """
    if manifest.undo is None:
        raise RestoreError(f"{quoted(merged.path)} was merged without --undo")
    folder = merged.folder / manifest.undo
    if folder.is_symlink() or not (folder / UNDO_NAME).is_file():
        raise RestoreError(f"the undo file {quoted(folder / UNDO_NAME)} is missing")
    try:
        adapters = [read_adapter(folder / adapter_file(index)) for index in range(len(manifest.adapters))]
        # To revert an update is the same on an adapter's own copy of the base's parameter.
        adapters = [replace(adapter, own_base={}) for adapter in adapters]
        targets = _targets_of(adapters, merged, manifest)
    except LoratoolError as error:
        raise RestoreError(f"the adapters beside the undo file cannot be used: {error}") from None
    for index, (adapter, recorded) in enumerate(zip(adapters, manifest.undo_adapters, strict=False)):
        if adapter.sha256 != recorded:
            raise RestoreError(f"{quoted(folder / adapter_file(index))} is not as the merge wrote it: it is damaged")
    undo = UndoFile(folder / UNDO_NAME, targets)

    def change(target: Target) -> Change:
        try:
            return ExactUnmerge(target, choose_device(device), undo.frames(target))
        except (AdapterError, CheckpointError) as error:
            raise RestoreError(f"an adapter beside the undo file is damaged: {error}") from None

    heads = kept_heads(folder, manifest.untied.sizes) if manifest.untied else {}
    return Restoration("undo", targets, change, Originals(folder, KEPT), heads)


def restore_from_base(merged: Checkpoint, manifest: Manifest, base: Checkpoint) -> Restoration:
    """Return the way back by copying the changed tensors from `base`, whose fingerprint is the manifest's.

    Raises:
        RestoreError: `base` does not have the changed tensors.
    """
    if manifest.untied:
        base = untied_as(base, manifest.untied.embedding, manifest.untied.head)
    targets = []
    for name in dict.fromkeys(map(parameter_name, manifest.changed)):
        weight = stored_weight(merged, name)
        if weight is None or stored_weight(base, name) is None or not _are_alike(weight, base):
            raise RestoreError(f"{quoted(name)} is stored differently in {quoted(merged.path)} and {quoted(base.path)}")
        targets.append(Target(weight, ()))
    originals = Originals(base.folder if base.path.is_dir() else None)
    return Restoration("base", tuple(targets), lambda target: _CopyFrom(base, target), originals, heads_of(base))


def _are_alike(weight: StoredWeight, base: Checkpoint) -> bool:
    """Return whether the base has tensors of the same dtypes and shapes for a parameter."""
    originals = [base.tensors.get(info.name) for info in weight.tensors]
    return all(
        original is not None and (info.dtype, info.shape) == (original.dtype, original.shape)
        for info, original in zip(weight.tensors, originals, strict=True)
    )


def restore_approximately(merged: Checkpoint, manifest: Manifest, adapters: list[Adapter],
                          device: str = "auto") -> Restoration:  # fmt: skip
    """Return the way back by arithmetic alone, ``round(W' - delta)``: about one element in a hundred is off by one rounding.

    Raises:
        RestoreError: arithmetic cannot invert an update because it depends on the original weights; or the model was untied.
    """
    if manifest.untied:
        raise RestoreError(f"{quoted(merged.path)} was untied, which arithmetic alone cannot undo")
    targets = _targets_of(adapters, merged, manifest)
    for target in targets:
        depends = (p.update for p in target.updates if p.update.needs_weight and not p.update.replaces)
        lost = next(depends, None)
        if lost is not None:
            raise RestoreError(
                f"{quoted(target.name)} was changed by {lost.kind}, which arithmetic alone cannot undo; unmerge with an undo "
                "file or from the base"
            )
    return Restoration("approximate", targets, lambda target: ApproximateUnmerge(target, choose_device(device)))


def _targets_of(adapters: list[Adapter], merged: Checkpoint, manifest: Manifest) -> tuple[Target, ...]:
    weighted = [
        WeightedAdapter(entry.restored(a), entry.weight) for a, entry in zip(adapters, manifest.adapters, strict=True)
    ]
    plan = plan_merge(weighted, merged, manifest.options.get("seed"))
    if plan.touched != set(manifest.changed):
        raise RestoreError(f"the adapters found are not those that were merged into {quoted(merged.path)}")
    return plan.targets


class _CopyFrom:
    """Replaces blocks of a matrix with another checkpoint's bytes."""

    def __init__(self, base: Checkpoint, target: Target) -> None:
        original = stored_weight(base, target.name)
        assert original is not None  # restore_from_base checked that both are stored alike
        self._original = original

    def blocks(self) -> Iterator[range]:
        return row_blocks(self._original.rows, self._original.columns * 4)

    def buffer(self, nbytes: int) -> torch.Tensor:
        import torch

        return torch.empty(nbytes, dtype=torch.uint8)

    def change(self, rows: range, parts: tuple[torch.Tensor, ...]) -> None:
        with opened({info.file for info in self._original.tensors}) as files:
            for (info, start, _), part in zip(self._original.extents(rows), parts, strict=True):
                read_exactly(files[info.file], bytes_of(part), start)


def unmerge_to(merged: Checkpoint, manifest: Manifest, way: Restoration, out: Path, *, force: bool = False,
               progress: Progress = lambda count: None) -> UnmergeReport:  # fmt: skip
    """Write the restored model to the new folder `out`.

    Raises:
        RestoreError: the result differs from the base's bytes; nothing is written then.
        OutputError: `out` exists, or cannot be written.
    """
    own = {MANIFEST_NAME} | ({manifest.undo} if manifest.undo else set())
    inherited = inherited_files(merged)
    others = [
        name
        for name in inherited.files
        if str(name) not in own and str(name.parent) not in own and str(name) not in manifest.changed_files
    ]
    copied = states_of(merged.folder / name for name in others)
    with staged_folder(out, OutputKind.MERGED_MODEL, force=force) as stage:
        with _restored_files(merged, manifest, way, stage, others, progress) as new:
            digests = stream(way.targets, way.change, new.places, progress=progress, beside=new.copies)
        inexact = check_restored(digests, manifest, way)
        missing, _ = way.originals.restore(manifest.changed_files, stage)
        for name in missing:
            if Path(name) in inherited.files:
                shutil.copyfile(merged.folder / name, stage / name)
        refuse_changed_meanwhile([*merged.states, *copied])
        if manifest.previous is not None:
            (stage / MANIFEST_NAME).write_bytes(manifest.previous)
        report = _with_missing(_report(way, inexact, merged, manifest), missing)
        return replace(report, notes=(*report.notes, *inherited.notes))


@contextmanager
def _restored_files(merged: Checkpoint, manifest: Manifest, way: Restoration, folder: Path, others: Sequence[Path],
                    progress: Progress) -> Iterator[NewWeights]:  # fmt: skip
    """Create the base's weight files: laid out like the merged model's, or without the head that was untied."""
    touched = frozenset(manifest.changed)
    if manifest.untied:
        with tied_files(merged, way.heads, manifest.untied.sizes, folder, touched, others, progress) as new:
            yield new
    else:
        with model_copy(merged, folder, touched, others, progress) as copy:
            yield NewWeights(places_in(copy, merged, touched), copy.copies)


def copy_base_to(base: Checkpoint, manifest: Manifest, out: Path, *, force: bool = False,
                 progress: Progress = lambda count: None) -> UnmergeReport:  # fmt: skip
    """Write the model in the folder of `base`, whose fingerprint is the manifest's, to the new folder `out`.

    This is the way back from a model in another storage, which contains none of the base's bytes.

    Raises:
        RestoreError: the base changed while it was copied; nothing is written then.
        OutputError: `out` exists, or cannot be written.
    """
    inherited = inherited_files(base)
    files = states_of(base.folder / name for name in inherited.files)
    own = [name for name in base.other_files() if str(name) == MANIFEST_NAME]
    with staged_folder(out, OutputKind.MERGED_MODEL, force=force) as stage:
        with model_copy(base, stage, (), [*inherited.files, *own], progress) as copy:
            in_threads(lambda job: job(), copy.copies, cpu_workers())
        copied = Checkpoint.open(stage)
        if fingerprint(copied.tensors, tensor_digests(copied)) != manifest.base_fingerprint:
            raise RestoreError(f"{quoted(base.path)} changed while it was copied; run again")
        refuse_changed_meanwhile([*base.states, *files])
    return UnmergeReport("base", (), inherited.notes)


def unmerge_in_place(merged: Checkpoint, manifest: Manifest, way: Restoration, *,
                     progress: Progress = lambda count: None) -> UnmergeReport:  # fmt: skip
    """Restore the model's own files in place, and remove the undo file.

    The caller holds an exclusive lock on the folder, which must contain no links.

    Raises:
        RestoreError: the result differs from the base's bytes; nothing has changed then.
        OutputError: the disk has no room for the change; nothing has changed then.
    """
    if manifest.untied:
        raise OutputError(f"{quoted(merged.path)} was untied, so the base has other files; unmerge with --out instead")
    with Journal(merged.folder) as journal:
        places = reserve(journal, way.targets)
        digests = stream(way.targets, way.change, places, progress=progress, ahead=journal.ahead())
        inexact = check_restored(digests, manifest, way)
        missing, added = way.originals.restore(manifest.changed_files, journal.new)
        if manifest.previous is not None:
            (journal.new / MANIFEST_NAME).write_bytes(manifest.previous)
        report = _with_missing(_report(way, inexact, merged, manifest), missing)
        removed = (*_own_files(merged, manifest), *added)
        journal.commit(remove=removed, check=partial(refuse_changed_meanwhile, merged.states))
    return report


def _with_missing(report: UnmergeReport, missing: Sequence[str]) -> UnmergeReport:
    """Return the report with notes on the base's files that could not be restored."""
    notes = [f"{quoted(name)} stays as the merge wrote it: the base's own file is not available" for name in missing]
    return replace(report, notes=(*report.notes, *notes))


def check_restored(digests: Mapping[str, Digests], manifest: Manifest, way: Restoration) -> tuple[str, ...]:
    """Return the names of the tensors that differ from the base's; an exact way must leave none.

    Raises:
        VerificationError: a tensor has changed since the merge.
        RestoreError: an exact way did not give the base's bytes.
    """
    for name, recorded in sorted(manifest.changed.items()):
        if digests[name].before != recorded.after:
            raise VerificationError(
                f"{quoted(name)} has changed since the merge, so it cannot be taken out; "
                "restore the merged model, or copy the base again"
            )
    inexact = tuple(
        sorted(name for name, recorded in manifest.changed.items() if digests[name].after != recorded.before)
    )
    if way.exact and inexact:
        raise RestoreError(
            f"{quoted(inexact[0])} was not restored to the base's bytes ({way.method}), so nothing was written; "
            "the undo file or the base is damaged"
        )
    return inexact


def _own_files(merged: Checkpoint, manifest: Manifest) -> tuple[str, ...]:
    """Return the files that loratool added for this merge alone; the undo folder is among them if it holds no other merge."""
    if manifest.undo is None:
        return (MANIFEST_NAME,)
    parent = merged.folder / Path(manifest.undo).parent
    if not parent.is_dir():
        return (MANIFEST_NAME,)
    alone = {entry.name for entry in parent.iterdir()} <= {Path(manifest.undo).name}
    return (MANIFEST_NAME, parent.name if alone else manifest.undo)


def _report(way: Restoration, inexact: tuple[str, ...], merged: Checkpoint, manifest: Manifest) -> UnmergeReport:
    """Report the method and every tensor that differs from the base's, including unmerged tensors that were changed since."""
    alone = [
        merged.tensors[name]
        for name in sorted((manifest.tensors.keys() & merged.tensors.keys()) - manifest.changed.keys())
    ]
    digests = in_threads(hash_tensor, alone, cpu_workers())
    changed = [info.name for info, digest in zip(alone, digests, strict=True) if digest != manifest.tensors[info.name]]
    notes = [f"{quoted(name)} was changed after the merge and is kept as it is now" for name in changed]
    edited = edited_since(manifest.changed_files, manifest.files, merged.folder)
    return UnmergeReport(way.method, (*inexact, *changed), (*notes, *edited, *_changed_files(merged, manifest)))


def _changed_files(merged: Checkpoint, manifest: Manifest) -> tuple[str, ...]:
    """Return notes on files beside the weights that changed since the merge."""
    notes = []
    for name, digest in sorted(manifest.files.items()):
        file = merged.folder / name
        if ".." in Path(name).parts or Path(name).is_absolute() or name in manifest.changed_files:
            continue
        if not has_file(file):
            notes.append(f"{quoted(name)} was removed after the merge")
        elif file_digest(file) != digest:
            notes.append(f"{quoted(name)} was changed after the merge and is kept as it is now")
    return tuple(notes)
