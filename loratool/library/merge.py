"""`loratool.merge`: adapters into the weights of a base model."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from loratool.checkpoint.file_role import FileRole, role_of
from loratool.checkpoint.fingerprint import fingerprint
from loratool.checkpoint.inheritance import inherited_files
from loratool.checkpoint.journal import refuse_links
from loratool.checkpoint.model import Checkpoint
from loratool.checkpoint.output_kind import OutputKind
from loratool.checkpoint.staging import refuse_no_text
from loratool.errors import LoratoolError, OutputError, quoted
from loratool.formats.adapter_names import SINGLE_FILE_SUFFIXES
from loratool.formats.alpha import Alpha
from loratool.formats.finite import refuse_not_finite
from loratool.library.adapter_spec import AdapterSpec, PathLike, with_weight
from loratool.library.already_merged import refuse_again
from loratool.library.base_of_adapter import base_of_all
from loratool.library.calibration import calibrated, calibration_text
from loratool.library.finished_before import finished_before
from loratool.library.holding import hold
from loratool.library.home_folder import remember
from loratool.library.merge_result import MergeResult, Outcome
from loratool.library.no_change import refuse_no_change, refuse_unchanged
from loratool.library.opening import open_registry
from loratool.library.output_place import beside_base, refuse_or_note_existing, refuse_overlap
from loratool.library.progress import Progress, Silent
from loratool.library.promised import Promised, PromisedMerge
from loratool.library.resolve import ResolvedAdapter, ResolvedBase, resolve_at_rank, resolve_base
from loratool.library.right_base import check_base
from loratool.library.tokenizer_choice import TokenizerChoice, TokenizerOf, choose_tokenizer
from loratool.library.trained_beside import refuse_trained_beside
from loratool.library.user_path import user_path
from loratool.merging.apply import BaseIdentity, Check, MergeReport, apply_conversion, apply_merge, merge_in_place
from loratool.merging.arithmetic import choose_device
from loratool.merging.changed_files import FileChanges
from loratool.merging.conversion_plan import ConversionPlan, StorageChange, plan_conversion
from loratool.merging.plan import MergePlan, WeightedAdapter, plan_merge
from loratool.merging.untied import UntiedCheckpoint, stored_of, untied
from loratool.weights.storages import MAKINGS
from registry import MergedAdapter, Registry, RegistryError

START_SECONDS: Final = 2.0
USUAL_BYTES_PER_SECOND: Final = 5e8
"""What a merge is expected to take where none was recorded: to start, and for each byte."""

FINISHED: Final = "an earlier run had merged it and was interrupted before the catalogue knew; nothing was added twice"


def merge(adapters: Sequence[AdapterSpec] | PathLike, into: PathLike | None = None, *, out: PathLike | None = None,
          in_place: bool = False, quantize: str | None = None, base_as: str | None = None, dequantize: bool = False,
          calibrate: PathLike | None = None,
          dry_run: bool = False, undo: bool = False, force: bool = False, any_base: bool = False,
          again: bool = False, allow_no_op: bool = False, without_extras: bool = False,
          tokenizer: TokenizerOf | None = None, untie: bool = False, device: str = "auto",
          alpha: Alpha | None = None, registry: str | None = None, progress: Progress | None = None) -> MergeResult:  # fmt: skip
    """Merge adapters into the weights of a base model: W' = W + the sum of weight * update, in fp32, rounded once.

    Args:
        adapters: catalogued names, paths or Hub ids, each alone or as (adapter, weight); one may stand alone. A DyLoRA
            acts at its full rank, or as ``ADAPTER@rank=b`` at rank b.
        into: the base: a catalogued name, a folder, a safetensors file, or a Hub id; by default the catalogued base that the
            adapters are tied to.
        out: the new folder; by default ``<base>-<adapter>`` beside the base.
        in_place: change the base's own files instead; an undo file is always kept.
        quantize: ``nf4``: merge into a dense base, then store its linear modules in NF4; the most exact NF4 model.
        base_as: ``nf4``: take a dense base as its NF4 image and merge into that, as if it had been quantized before.
        dequantize: decode a quantized base and merge densely: W' = decoded W + the update, rounded once to its own dtype.
        calibrate: a file of samples, as of `loratool.eval`: round 4-bit weights so that the outputs of their layers on such
            text are off by less (`loratool.weights.coarse.feedback`). Runs the model. An undo file is always kept.
        dry_run: plan and check only; write nothing.
        undo: keep an undo file in the new folder, so that the merge can be taken out when the base is gone.
        force: replace a merged model that loratool wrote before.
        any_base: merge into another base than an adapter records, or one that is not what was catalogued.
        again: add the update of an adapter that is in the base's weights already once more.
        allow_no_op: go on where an adapter, or the whole merge, changes nothing.
        without_extras: leave out weights that were trained with an adapter and lie beside it in files of their own.
        tokenizer: ``base``, or ``adapter``: that of the first adapter that has one; by default the adapter's where it trained
            the embeddings of tokens or its tokenizer or chat template says otherwise than the base's.
        untie: give the output head, which the base ties to its input embedding, a tensor of its own in the new folder.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        alpha: for a bare adapter file that does not say its own: a number, or ``rank`` for each module's rank.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.
        progress: told how many bytes are done.

    Raises:
        LoratoolError, registry.RegistryError: says what is wrong; nothing was written then.
    """
    if in_place and out is not None:
        raise LoratoolError("a merge goes either in place or to --out; give one of them")
    change = _storage_change(quantize, base_as, dequantize=dequantize)
    _refuse_beside_change(change, in_place=in_place, undo=undo)
    _refuse_untying(untie, change, in_place=in_place, calibrated=calibrate is not None)
    text = calibration_text(calibrate, otherwise_stored=change is not None)
    started = time.monotonic()
    watcher = progress or Silent()
    specs = [with_weight(spec) for spec in ([adapters] if isinstance(adapters, str | os.PathLike) else adapters)]
    allowed = Allowed(force=force, any_base=any_base, again=again, no_op=allow_no_op,
                      without_extras=without_extras)  # fmt: skip
    with open_registry(registry, read_only=True, settled=not in_place) as catalogue:
        resolved = [resolve_at_rank(name, catalogue, alpha) for name, _ in specs]
        base = resolve_base(
            base_of_all(resolved, catalogue) if into is None else into,
            catalogue,
            watcher,
            download=not (dry_run or in_place),
        )
        weighted = [WeightedAdapter(found.adapter, weight) for found, (_, weight) in zip(resolved, specs, strict=True)]
        refuse_no_text([base.path, *(found.adapter.file for found in resolved)])
        if in_place:
            _refuse_away(base)
        else:
            refuse_overlap(_output(out, base, resolved, change), [base.path, *(each.adapter.file for each in resolved)])
        target = base.path if in_place else _output(out, base, resolved, change)
        merged = tuple(_merged(found, each.weight) for found, each in zip(resolved, weighted, strict=True))
        with hold(base.path, exclusive=in_place and not dry_run):
            checkpoint = base.open()
            if in_place:
                _refuse_in_place(checkpoint)
            with base.explained():
                into_what = untied(checkpoint, [each.adapter for each in weighted]) if untie else checkpoint
                plan = plan_merge(weighted, into_what)
            chosen = choose_tokenizer(resolved, plan, tokenizer) if base.headers is None else TokenizerChoice()
            if base.headers is None:
                plan = replace(plan, files=_changed_files(plan, chosen))
            conversion = None if change is None else plan_conversion(checkpoint, change, plan)
            outcome = Outcome(target, base.name, merged, plan, conversion, in_place=in_place, tokenizer=chosen)
            done = finished_before(checkpoint, weighted, catalogue, watcher) if in_place and not dry_run else None
            if done is not None:
                return _recorded(outcome.of(done, time.monotonic() - started, [FINISHED]), catalogue)
            digests, notes = _check(base, resolved, plan, catalogue, watcher, allowed, device=device,
                                    in_place=in_place, dry_run=dry_run)  # fmt: skip
            notes += chosen.notes
            if not in_place:
                kind = OutputKind.MERGED_MODEL
                notes += refuse_or_note_existing(target, kind, force=force, dry_run=dry_run)
            if dry_run:
                known = fingerprint(checkpoint.tensors, digests) if digests else None
                return outcome.expected(known, _expected_seconds(plan, catalogue, in_place=in_place), notes)
            identity = BaseIdentity(base.name, digests)
            with (
                Promised(PromisedMerge.of(target, merged, in_place=in_place), catalogue) as promised,
                calibrated(plan, text, device, watcher) as plan,
            ):
                check = partial(refuse_unchanged, plan=plan, allow=allow_no_op)
                report = _apply(plan, conversion, target, identity, in_place=in_place, undo=undo or text is not None,
                                device=device, force=force, check=check, watcher=watcher)  # fmt: skip
                if not in_place and not digests:
                    remember(checkpoint, report.base_digests)
                result = outcome.of(report.manifest, time.monotonic() - started, notes)
                return _recorded(result, catalogue, promised)


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a user said to go past: an earlier output, the base's fingerprint, a merge made before, one that does nothing,
    weights that lie beside an adapter."""

    force: bool
    any_base: bool
    again: bool
    no_op: bool
    without_extras: bool


def _check(base: ResolvedBase, adapters: Sequence[ResolvedAdapter], plan: MergePlan, catalogue: Registry,
           watcher: Progress, allowed: Allowed, *, device: str, in_place: bool,
           dry_run: bool) -> tuple[dict[str, str] | None, list[str]]:  # fmt: skip
    """Check all that is not in the plan before anything is written: repeats, numbers, device, effect, base.

    Returns the digests of the base's tensors, where its fingerprint matters, and notes.

    Raises:
        LoratoolError: says what is wrong.
    """
    refuse_trained_beside([found.adapter for found in adapters], without=allowed.without_extras)
    repeats = refuse_again(adapters, stored_of(plan.base), catalogue, watcher, again=allowed.again)
    for found in adapters if dry_run else ():  # a merge looks when it reads them
        refuse_not_finite(found.adapter)
    if device.startswith("cuda"):
        choose_device(device)  # raises where there is none, before anything is copied
    no_ops = refuse_no_change(plan.adapters, allow=allowed.no_op)
    digests, notes = check_base(base, adapters, stored_of(plan.base), catalogue, watcher, any_base=allowed.any_base)
    left_out = () if in_place else inherited_files(plan.base).notes
    return digests, [*notes, *repeats, *no_ops, *plan.notes, *left_out]


def _apply(plan: MergePlan, conversion: ConversionPlan | None, target: Path, identity: BaseIdentity, *, in_place: bool,
           undo: bool, device: str, force: bool, check: Check, watcher: Progress) -> MergeReport:  # fmt: skip
    """Write what is planned: a model stored otherwise, the base's own files, or a new folder."""
    if conversion is not None:
        watcher.begin("merging", conversion.read_bytes)
        return apply_conversion(
            conversion, target, identity, device=device, force=force, check=check, progress=watcher.advance
        )
    if in_place:
        watcher.begin("merging", plan.touched_bytes)
        return merge_in_place(plan, identity, device=device, check=check, progress=watcher.advance)
    watcher.begin("merging", sum(header.size for header in plan.base.headers))
    return apply_merge(
        plan, target, identity, device=device, undo=undo, force=force, check=check, progress=watcher.advance
    )


def _storage_change(quantize: str | None, base_as: str | None, *, dequantize: bool) -> StorageChange | None:
    """Return how the merged model is stored, if differently than its base."""
    for option, value in (("--quantize", quantize), ("--base-as", base_as)):
        if value not in (None, *MAKINGS):
            names = " or ".join(MAKINGS)
            raise LoratoolError(
                f"{option} is {quoted(value)}, and loratool quantizes to {names} alone; give {option} {names}"
            )
    if sum((quantize is not None, base_as is not None, dequantize)) > 1:
        raise LoratoolError("--quantize, --base-as and --dequantize contradict one another; give one of them")
    if quantize:
        return StorageChange("quantize", MAKINGS[quantize]({}))
    if base_as:
        return StorageChange("base_as", MAKINGS[base_as]({}))
    return StorageChange("dequantize") if dequantize else None


def _refuse_untying(untie: bool, change: StorageChange | None, *, in_place: bool, calibrated: bool) -> None:
    """Raise LoratoolError for what cannot be made of a model whose head is untied on the way."""
    option = "--in-place" if in_place else "--calibrate" if calibrated else None
    if untie and (option or change is not None):
        raise LoratoolError(
            "--untie writes a model with a tensor more, in the base's own storage, to a new folder; leave "
            f"{option or '--quantize, --base-as and --dequantize'} out, or merge twice"
        )


def _changed_files(plan: MergePlan, chosen: TokenizerChoice) -> FileChanges:
    """What is written beside the weights in place of the base's files."""
    return chosen.files.joined(plan.base.files()) if isinstance(plan.base, UntiedCheckpoint) else chosen.files


def _refuse_beside_change(change: StorageChange | None, *, in_place: bool, undo: bool) -> None:
    """Raise LoratoolError for what a model cannot have that holds none of its base's bytes."""
    option = "--in-place" if in_place else "--undo" if undo else None
    if change is None or option is None:
        return
    raise LoratoolError(
        f"a model that is stored otherwise than its base cannot be made with {option}: the base's own bytes are not in "
        f"it; leave {option} out, and keep the base to unmerge from"
    )


def _output(out: str | os.PathLike[str] | None, base: ResolvedBase, adapters: Sequence[ResolvedAdapter],
            change: StorageChange | None) -> Path:  # fmt: skip
    """`out`, or ``<base>-<adapter>-...`` beside the base (in the working folder for a base in the Hub's cache)."""
    if out is not None:
        path = user_path(out)
        if path.suffix in SINGLE_FILE_SUFFIXES:
            raise OutputError(f"a merged model is a folder; give --out a folder's name instead of {quoted(path.name)}")
        return path
    ending = [] if change is None else ["dense" if change.making is None else change.making.storage]
    return beside_base(base, "-".join([base.name, *(found.label for found in adapters), *ending]))


def _refuse_away(base: ResolvedBase) -> None:
    """Raise OutputError for a base that is on the Hub and not downloaded: there is nothing to change in place."""
    if base.headers is not None:
        raise OutputError(
            f"base {quoted(base.name)} is on the Hub, which nothing changes in place; merge with --out instead"
        )


def _refuse_in_place(checkpoint: Checkpoint) -> None:
    if not checkpoint.path.is_dir():
        raise OutputError(f"{quoted(checkpoint.path)} is a single file; only a model's own folder can change in place")
    refuse_links(checkpoint.path, [header.file for header in checkpoint.headers])
    adapter = next((name for name in checkpoint.other_files() if role_of(name) is FileRole.ADAPTER), None)
    if adapter is not None:
        raise OutputError(
            f"{quoted(checkpoint.path)} holds {quoted(adapter)} too, an adapter that transformers would put on top of what is "
            "merged; move it to a folder of its own, or merge with --out"
        )


def _merged(found: ResolvedAdapter, weight: float) -> MergedAdapter:
    return MergedAdapter(adapter=found.reference, sha256=found.adapter.sha256, weight=weight)


def _recorded(result: MergeResult, catalogue: Registry, promised: Promised | None = None) -> MergeResult:
    """The result, once the catalogue knows of it. The model is written by now: a catalogue that is busy, full or somebody
    else's is a note."""
    try:
        with catalogue.for_writing() as writable:
            _record(result, writable)
    except RegistryError as error:
        if promised is not None:
            promised.postpone(error)
        return replace(
            result, notes=(*result.notes, f"the merge is done but the catalogue does not know of it: {error}")
        )
    return result


def _record(result: MergeResult, catalogue: Registry) -> None:
    catalogue.merges.record(
        result.out.absolute(),
        base_fingerprint=str(result.base_fingerprint),
        merged=result.adapters,
        output_fingerprint=result.output_fingerprint,
        undo_file=None if result.undo_file is None else result.undo_file.absolute(),
        in_place=result.in_place,
        options={
            "seconds": result.seconds,
            **({} if result.conversion is None else result.conversion.change.to_options()),
            **({} if result.survival is None else {"survival": result.survival.to_json()}),
            "size_bytes": result.plan.touched_bytes if result.in_place else result.plan.base.nbytes,
        },
    )


def _expected_seconds(plan: MergePlan, catalogue: Registry, *, in_place: bool) -> float:
    """What the merge will take, from the speed of merges recorded before."""
    rates = []
    for record in catalogue.merges.list()[:20]:
        options = record.options or {}
        seconds, size = options.get("seconds"), options.get("size_bytes")
        if isinstance(seconds, float) and isinstance(size, int) and seconds > START_SECONDS and size > 1e8:
            rates.append(size / (seconds - START_SECONDS))
    rate = statistics.median(rates) if rates else USUAL_BYTES_PER_SECOND
    return START_SECONDS + (plan.touched_bytes if in_place else plan.base.nbytes) / rate
