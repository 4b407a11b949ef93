"""Apply a plan: write a new model folder, in the base's storage or another, or change the base in place."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict

from blake3 import blake3

from loratool.checkpoint.file_state import FileState, refuse_changed_meanwhile, states_of
from loratool.checkpoint.fingerprint import file_digest, fingerprint, hash_tensor
from loratool.checkpoint.header import TensorInfo
from loratool.checkpoint.inheritance import inherited_files
from loratool.checkpoint.journal import Journal
from loratool.checkpoint.model import Checkpoint
from loratool.checkpoint.model_copy import ModelCopy, model_copy
from loratool.checkpoint.output_kind import UNDO_FOLDER, OutputKind
from loratool.checkpoint.staging import staged_folder
from loratool.errors import CheckpointError, quoted
from loratool.formats.adapter import sha256_of
from loratool.formats.content import content_of
from loratool.formats.facts import parents_of
from loratool.formats.write import write_single_file
from loratool.merging.arithmetic import Merge, choose_device
from loratool.merging.changed_files import FileChanges
from loratool.merging.contents import contents_of_base
from loratool.merging.conversion_plan import ConversionPlan
from loratool.merging.conversion_stream import write_converted
from loratool.merging.delivery import Delivery, DeliveryCount
from loratool.merging.manifest import MANIFEST_NAME, MAX_PREVIOUS_BYTES, Manifest, MergedAdapter, Untied
from loratool.merging.plan import MergePlan, Target, WeightedAdapter
from loratool.merging.stream import Digests, Place, Progress, stream
from loratool.merging.undo import UNDO_NAME, UndoWriter, adapter_file
from loratool.merging.untied import NewWeights, UntiedCheckpoint, keep_heads, sizes_of, stored_of, untied_files
from loratool.merging.workers import Job


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """The base's name, and the digests of its tensors if they were computed before."""

    name: str
    digests: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class MergeReport:
    """The manifest of a merge or a conversion, and the digests of the base's tensors, which a cache may keep."""

    manifest: Manifest
    base_digests: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Output:
    """Destinations of a merge that keeps the base's storage.

    Attributes:
        folder: receives the manifest and the undo folder.
        places: destinations of the tensors that change, by name.
        others: the base's other files that the model keeps, relative to its folder.
        beside, ahead: other jobs of the same workers (`work_through`).
        in_place: whether the base's own files change.
    """

    folder: Path
    places: Mapping[str, Place]
    others: Sequence[Path]
    beside: Iterable[Job] = ()
    ahead: Iterable[Job] = ()
    in_place: bool = False


Check = Callable[[Manifest], None]
"""Inspects the manifest before any output gets its final name or any file changes in place; it may raise to stop the merge."""


def apply_merge(plan: MergePlan, out: Path, base: BaseIdentity, *, device: str = "auto", undo: bool = False,
                force: bool = False, check: Check = lambda manifest: None,
                progress: Progress = lambda count: None) -> MergeReport:  # fmt: skip
    """Write the merged model to the new folder `out`; with `undo`, also write the undo folder.

    Raises:
        OutputError: `out` exists, or cannot be written.
        CheckpointError, AdapterError: a file changed or is damaged; nothing is written then.
    """
    others = [name for name in inherited_files(plan.base).files if str(name) not in plan.files.names]
    sources = _sources(plan.base, others, plan.adapters, plan.files)
    with staged_folder(out, OutputKind.MERGED_MODEL, force=force) as stage:
        with _new_weights(plan, stage, others, progress) as new:
            output = _Output(stage, new.places, others, beside=new.copies)
            report = _merge(plan, output, base, device=device, undo=undo, progress=progress)
        plan.files.write(stage)
        refuse_changed_meanwhile(sources)
        check(report.manifest)
        (stage / MANIFEST_NAME).write_text(report.manifest.to_json(), encoding="utf-8")
    return report


def apply_conversion(plan: ConversionPlan, out: Path, base: BaseIdentity, *, device: str = "cpu", force: bool = False,
                     check: Check = lambda manifest: None,
                     progress: Progress = lambda count: None) -> MergeReport:  # fmt: skip
    """Write the model in its new storage to the new folder `out`, including the planned merge if there is one.

    Raises:
        OutputError: `out` exists, or cannot be written.
        CheckpointError, AdapterError: a file changed or is damaged; nothing is written then.
    """
    kind = OutputKind.MERGED_MODEL if plan.merge else OutputKind.QUANTIZED_MODEL
    merged = plan.merge.adapters if plan.merge else ()
    files = plan.merge.files if plan.merge else FileChanges()
    sources = _sources(plan.base, plan.others, merged, files)
    with staged_folder(out, kind, force=force) as stage:
        converted = write_converted(plan, stage, device=device, known=base.digests or {}, progress=progress)
        files.write(stage)
        before, written = fingerprint(plan.base.tensors, converted.before), Checkpoint.open(stage)
        manifest = Manifest(
            kind="merge" if plan.merge else "quantization",
            base_name=base.name,
            base_path=str(plan.base.path.absolute()),
            base_fingerprint=before,
            fingerprint=fingerprint(plan.layout.tensors, converted.after),
            adapters=tuple(_merged_adapter(weighted) for weighted in merged),
            options=_conversion_options(plan, device),
            versions=_versions(),
            changed={},
            tensors=converted.after,
            files=_file_digests(written, written.other_files()),
            unchanged=converted.unchanged,
            earlier=contents_of_base(plan.base.folder, before),
            changed_files=files.recorded(plan.base.folder),
            **_delivery(converted.delivery),
        )
        refuse_changed_meanwhile(sources)
        check(manifest)
        (stage / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return MergeReport(manifest, converted.before)


def _conversion_options(plan: ConversionPlan, device: str) -> dict[str, str]:
    seed = {"seed": plan.merge.seed} if plan.merge and plan.change.way == "base_as" else {}
    return {"device": _kind_of_device(device), **plan.change.to_options(), **seed}


def merge_in_place(plan: MergePlan, base: BaseIdentity, *, device: str = "auto", check: Check = lambda manifest: None,
                   progress: Progress = lambda count: None) -> MergeReport:  # fmt: skip
    """Change the base's own files and always keep an undo.

    The caller holds an exclusive lock on the folder, which must contain no links.

    Raises:
        OutputError: the disk has no room for the change; nothing has changed then.
    """
    with Journal(plan.base.folder) as journal:
        places = reserve(journal, plan.targets)
        others = [name for name in plan.base.other_files() if str(name) not in plan.files.names]
        sources = _sources(plan.base, others, plan.adapters, plan.files)
        output = _Output(journal.new, places, others, ahead=journal.ahead(), in_place=True)
        report = _merge(plan, output, base, device=device, undo=True, progress=progress)
        plan.files.write(journal.new)
        check(report.manifest)
        (journal.new / MANIFEST_NAME).write_text(report.manifest.to_json(), encoding="utf-8")
        removed = tuple(sorted(plan.files.removed))
        journal.commit(remove=removed, check=partial(refuse_changed_meanwhile, sources))
    return report


def _sources(base: Checkpoint, others: Iterable[Path], adapters: Iterable[WeightedAdapter],
             files: FileChanges) -> tuple[FileState, ...]:  # fmt: skip
    """Return the states of all input files: the base's weights, `others` in its folder, the adapters', and added files."""
    of_adapters = (state for weighted in adapters for state in weighted.adapter.states)
    brought = (content for content in files.written.values() if isinstance(content, Path))
    return (*base.states, *states_of(base.folder / name for name in others), *of_adapters, *states_of(brought))


@contextmanager
def _new_weights(plan: MergePlan, folder: Path, others: Collection[Path], progress: Progress) -> Iterator[NewWeights]:
    """Create the weight files of the merged model: laid out like the base's, or with one more tensor if it is untied."""
    if isinstance(plan.base, UntiedCheckpoint):
        with untied_files(plan.base, folder, plan.touched, others, progress) as new:
            yield new
    else:
        with model_copy(plan.base, folder, plan.touched, others, progress) as copy:
            yield NewWeights(places_in(copy, plan.base, plan.touched), copy.copies)


def places_in(copy: ModelCopy, base: Checkpoint, names: Iterable[str]) -> dict[str, Place]:
    """Return where the base's tensors `names` are in its copy."""
    files = {name: base.tensors[name].file for name in names}
    return {name: Place(copy.files[file], direct=copy.direct.get(file)) for name, file in files.items()}


def reserve(journal: Journal, targets: Iterable[Target]) -> dict[str, Place]:
    """Reserve room in the journal for every tensor of the targets, and allocate it on disk."""
    places = {}
    for info in sorted((info for target in targets for info in target.weight.tensors), key=lambda info: info.name):
        places[info.name] = Place(journal.fd, journal.reserve(info.file, info.start, info.stop) - info.start)
    journal.preallocate()
    return places


def _merge(plan: MergePlan, output: _Output, base: BaseIdentity, *, device: str, undo: bool,
           progress: Progress) -> MergeReport:  # fmt: skip
    """Stream the targets to their places, write the undo if requested, and describe the result in a manifest."""
    known = base.digests or {}
    digests = {name: digest for name, digest in known.items() if name not in plan.touched}
    unknown = [info for name, info in plan.base.tensors.items() if name not in plan.touched and name not in digests]
    previous = _previous_manifest(plan.base)
    delivery: dict[str, DeliveryCount] = {}  # keeping the Merge objects would keep their scales and factors in memory
    undo_folder = f"{UNDO_FOLDER}/{_undo_id(plan, previous)}" if undo else None
    with _undo_writer(plan, output.folder, undo_folder) as writer:

        def change(target: Target) -> Merge:
            merge = Merge(target, choose_device(device), writer.keeper(target.name) if writer else None)
            delivery[target.name] = merge.delivery
            return merge

        changed = stream(
            plan.targets,
            change,
            output.places,
            progress=progress,
            beside=[*output.beside, *(partial(_hash_into, digests, info) for info in unknown)],
            ahead=output.ahead,
            known=known,
        )
    before = digests | {name: pair.before for name, pair in changed.items()}
    after = digests | {name: pair.after for name, pair in changed.items()}
    base_fingerprint = fingerprint(stored_of(plan.base).tensors, before)
    manifest = Manifest(
        base_name=base.name,
        base_path=str(plan.base.path.absolute()),
        base_fingerprint=base_fingerprint,
        fingerprint=fingerprint(plan.base.tensors, after),
        adapters=tuple(_merged_adapter(weighted) for weighted in plan.adapters),
        options={"device": _kind_of_device(device)}
        | ({"seed": plan.seed} if any(target.weight.takes == "change" for target in plan.targets) else {})
        | ({"calibration": plan.calibration} if plan.calibration else {}),
        versions=_versions(),
        changed=changed,
        tensors=after,
        files=_file_digests(plan.base, output.others) | plan.files.digests(),
        undo=undo_folder,
        undo_adapters=_undo_adapters(plan, output.folder, undo_folder),
        previous=previous,
        in_place=output.in_place,
        earlier=() if previous else contents_of_base(plan.base.folder, base_fingerprint),
        unchanged=tuple(target.name for target in plan.targets if _is_unchanged(target, changed)),
        changed_files=plan.files.recorded(plan.base.folder),
        untied=_untied(plan.base),
        **_delivery(delivery),
    )
    return MergeReport(manifest, before)


def _untied(base: Checkpoint) -> Untied | None:
    return Untied(base.head, base.embedding, sizes_of(base)) if isinstance(base, UntiedCheckpoint) else None


def _is_unchanged(target: Target, digests: Mapping[str, Digests]) -> bool:
    return all(digests[info.name].before == digests[info.name].after for info in target.weight.tensors)


class _DeliveryFields(TypedDict):
    delivery: dict[str, Delivery]
    delivery_of_all: Delivery | None


def _delivery(counts: Mapping[str, DeliveryCount]) -> _DeliveryFields:
    """Return the delivered shares that a manifest records, for each parameter that was measured and for all together."""
    known = {name: count for name, count in sorted(counts.items()) if count.is_known}
    return {
        "delivery": {name: count.delivery() for name, count in known.items()},
        "delivery_of_all": DeliveryCount.of_all(known.values()).delivery() if known else None,
    }


def _kind_of_device(device: str) -> str:
    return "cuda" if choose_device(device).startswith("cuda") else "cpu"


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("loratool", "torch", "safetensors")}


def _undo_writer(plan: MergePlan, folder: Path, undo_folder: str | None) -> AbstractContextManager[UndoWriter | None]:
    """Create the undo folder with its adapters and return a writer for its undo file; do nothing without a folder."""
    if undo_folder is None:
        return nullcontext()
    target = folder / undo_folder
    target.mkdir(parents=True)
    for index, weighted in enumerate(plan.adapters):
        write_single_file(weighted.adapter, target / adapter_file(index))
    plan.files.keep(plan.base.folder, target)
    if isinstance(plan.base, UntiedCheckpoint):
        keep_heads(plan.base, target)
    return UndoWriter(target / UNDO_NAME)


def _undo_adapters(plan: MergePlan, folder: Path, undo_folder: str | None) -> tuple[str, ...]:
    """Return the sha256 of each adapter in the undo folder."""
    if undo_folder is None:
        return ()
    return tuple(sha256_of(folder / undo_folder / adapter_file(index)) for index in range(len(plan.adapters)))


def _undo_id(plan: MergePlan, previous: bytes | None) -> str:
    """Return twelve hexadecimal digits that distinguish this merge from others stacked on the same base."""
    merged = [
        [each.adapter.sha256, each.weight, [update.scaling for update in each.adapter.ranked.values()]]
        for each in plan.adapters
    ]
    return str(blake3(json.dumps([merged, previous and previous.decode()]).encode()).hexdigest()[:12])


def _merged_adapter(weighted: WeightedAdapter) -> MergedAdapter:
    adapter = weighted.adapter
    return MergedAdapter(
        name=adapter.name,
        sha256=adapter.sha256,
        weight=weighted.weight,
        kind=adapter.kind,
        rank=adapter.rank,
        alpha=adapter.alpha,
        file=str(adapter.file.absolute()),
        scaling=adapter.scaling,
        content=content_of(adapter),
        parents=parents_of(adapter.facts),
    )


def _previous_manifest(base: Checkpoint) -> bytes | None:
    file = base.folder / MANIFEST_NAME
    if not base.path.is_dir() or not file.is_file():
        return None
    if file.stat().st_size > MAX_PREVIOUS_BYTES:
        raise CheckpointError(f"{quoted(file)} is too large to keep for unmerging; merge into the first base instead")
    content = file.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"{quoted(file)} is not a text file; remove it, or move it out of the model") from None
    return content


def _file_digests(model: Checkpoint, names: Iterable[Path]) -> dict[str, str]:
    """Return the BLAKE3 digests of a model's other files, without the manifest: a base's own manifest is kept whole."""
    return {str(name): file_digest(model.folder / name) for name in names if str(name) != MANIFEST_NAME}


def _hash_into(digests: dict[str, str], info: TensorInfo) -> None:
    digests[info.name] = hash_tensor(info)
