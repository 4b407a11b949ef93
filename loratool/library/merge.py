"""`loratool.merge`: merge adapters into the weights of a base model."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from loratool.library.checking.already_merged import refuse_again
from loratool.library.checking.delivery import delivery_check
from loratool.library.checking.no_change import refuse_no_change
from loratool.library.checking.right_base import check_base
from loratool.library.checking.trained_beside import refuse_trained_beside
from loratool.library.merges.calibration import calibrated
from loratool.library.merges.options import Allowed, MergeOptions, Storage, Writing
from loratool.library.merges.record import expected_seconds, recorded
from loratool.library.merges.result import MergeResult, Outcome
from loratool.library.merges.tokenizer_choice import TokenizerChoice, TokenizerOf, choose_tokenizer
from loratool.library.places.holding import hold
from loratool.library.places.home_folder import remember
from loratool.library.places.output_place import beside_base, refuse_or_note_existing, refuse_overlap
from loratool.library.places.user_path import user_path
from loratool.library.recording.base_of_adapter import base_of_all
from loratool.library.recording.finished_before import finished_before
from loratool.library.recording.opening import open_registry
from loratool.library.recording.promised import Promised, PromisedMerge
from loratool.library.reporting.progress import Progress, Silent
from loratool.library.resolving.adapter_spec import AdapterSpec, PathLike, with_weight
from loratool.library.resolving.resolve import ResolvedAdapter, ResolvedBase, resolve_at_rank, resolve_base
from loratool.merging.apply import BaseIdentity, MergeReport, apply_conversion, apply_merge, merge_in_place
from loratool.merging.arithmetic import choose_device
from loratool.merging.changed_files import FileChanges
from loratool.merging.conversion_plan import StorageChange, plan_conversion
from loratool.merging.plan import MergePlan, WeightedAdapter, plan_merge
from loratool.merging.untied import UntiedCheckpoint, stored_of, untied
from registry import MergedAdapter, Registry

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
        adapters: catalogued names, paths or Hub ids, each alone or as (adapter, weight); a single one needs no list. A DyLoRA
            has its full rank, or rank b as ``ADAPTER@rank=b``.
        into: the base: a catalogued name, a folder, a safetensors file, or a Hub id; by default the catalogued base that the
            adapters are tied to.
        out: the new folder; by default ``<base>-<adapter>`` beside the base.
        in_place: change the base's own files instead; an undo file is always kept.
        quantize: ``nf4``: merge into a dense base, then store its linear modules in NF4; the most exact NF4 model.
        base_as: ``nf4``: quantize a dense base to NF4 and merge into that, without writing the quantized base.
        dequantize: decode a quantized base and merge densely: W' = decoded W + the update, rounded once to its own dtype.
        calibrate: a file of samples, as for `loratool.eval`: round quantized weights so that the outputs of their layers on
            such text have smaller errors (`loratool.weights.coarse.feedback`). Runs the model. An undo file is always kept.
        dry_run: plan and check only; write nothing.
        undo: keep an undo file in the new folder, so that the merge can be undone without the base.
        force: replace a merged model that loratool wrote.
        any_base: merge into another base than an adapter records, or into one that has changed since it was catalogued.
        again: merge an adapter that is in the base's weights already.
        allow_no_op: continue if an adapter, or the whole merge, changes nothing, or if less than half of the update is
            delivered.
        without_extras: leave out weights that were trained with an adapter but are in files of their own beside it.
        tokenizer: ``base``, or ``adapter``: that of the first adapter that has one. By default the adapter's if it trained
            token embeddings, or if its tokenizer or chat template differs from the base's.
        untie: give the output head, which the base ties to its input embedding, its own tensor in the new folder.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        alpha: alpha of a bare adapter file that does not state it: a number, or ``rank`` for each module's rank.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.
        progress: receives the number of bytes done.

    Raises:
        LoratoolError, registry.RegistryError: the message says what is wrong; nothing is written.
    """
    if in_place and out is not None:
        raise LoratoolError("a merge goes either in place or to --out; give one of them")
    allowed = Allowed(force=force, any_base=any_base, again=again, no_op=allow_no_op,
                      without_extras=without_extras)  # fmt: skip
    options = MergeOptions.of(Storage(quantize, base_as, dequantize), calibrate, allowed,
                              Writing(in_place, undo, untie, dry_run), tokenizer=tokenizer, device=device)  # fmt: skip
    started, watcher = time.monotonic(), progress or Silent()
    specs = [with_weight(spec) for spec in ([adapters] if isinstance(adapters, str | os.PathLike) else adapters)]
    with open_registry(registry, read_only=True, settled=not in_place) as catalogue:
        sources = _resolve(specs, into, catalogue, options, alpha, watcher)
        target = _target(out, sources, options)
        with hold(sources.base.path, exclusive=options.changes_base):
            checkpoint = sources.base.open()
            plan, outcome = _plan(sources, checkpoint, target, options)
            done = finished_before(checkpoint, sources.weighted, catalogue, watcher) if options.changes_base else None
            if done is not None:
                return recorded(outcome.of(done, time.monotonic() - started, [FINISHED]), catalogue)
            digests, notes = _check(sources, plan, catalogue, watcher, options)
            notes += outcome.tokenizer.notes
            if not in_place:
                notes += refuse_or_note_existing(target, OutputKind.MERGED_MODEL, force=force, dry_run=dry_run)
            if dry_run:
                known = fingerprint(checkpoint.tensors, digests) if digests else None
                return outcome.expected(known, expected_seconds(plan, catalogue, in_place=in_place), notes)
            promise = PromisedMerge.of(target, outcome.adapters, in_place=in_place)
            with Promised(promise, catalogue) as promised, calibrated(plan, options.text, device, watcher) as plan:
                report = _apply(plan, outcome, BaseIdentity(sources.base.name, digests), options, watcher)
                if not in_place and not digests:
                    remember(checkpoint, report.base_digests)
                return recorded(outcome.of(report.manifest, time.monotonic() - started, notes), catalogue, promised)


@dataclass(frozen=True, slots=True)
class _Sources:
    """The base, and the adapters with their weights."""

    base: ResolvedBase
    adapters: tuple[ResolvedAdapter, ...]
    weighted: tuple[WeightedAdapter, ...]

    @property
    def files(self) -> list[Path]:
        """The paths of the base and of the adapters."""
        return [self.base.path, *(found.adapter.file for found in self.adapters)]


def _resolve(specs: Sequence[tuple[PathLike, float]], into: PathLike | None, catalogue: Registry, options: MergeOptions,
             alpha: Alpha | None, watcher: Progress) -> _Sources:  # fmt: skip
    """Find the adapters and the base.

    Raises:
        LoratoolError, registry.RegistryError: one does not exist, or cannot be used as requested.
    """
    adapters = tuple(resolve_at_rank(name, catalogue, alpha) for name, _ in specs)
    base = resolve_base(
        base_of_all(adapters, catalogue) if into is None else into,
        catalogue,
        watcher,
        download=not (options.writing.dry_run or options.writing.in_place),
    )
    weighted = tuple(WeightedAdapter(found.adapter, weight) for found, (_, weight) in zip(adapters, specs, strict=True))
    sources = _Sources(base, adapters, weighted)
    refuse_no_text(sources.files)
    if options.writing.in_place:
        _refuse_away(base)
    return sources


def _target(out: PathLike | None, sources: _Sources, options: MergeOptions) -> Path:
    """Return the folder of the merged model: the base's own, or a new one that does not overlap the sources."""
    if options.writing.in_place:
        return sources.base.path
    target = _output(out, sources.base, sources.adapters, options.change)
    refuse_overlap(target, sources.files)
    return target


def _plan(sources: _Sources, checkpoint: Checkpoint, target: Path, options: MergeOptions) -> tuple[MergePlan, Outcome]:
    """Plan the merge from headers alone.

    Raises:
        LoratoolError: an adapter does not land on the base, or the base cannot be changed as requested.
    """
    base = sources.base
    if options.writing.in_place:
        _refuse_in_place(checkpoint)
    with base.explained():
        into = untied(checkpoint, [each.adapter for each in sources.weighted]) if options.writing.untie else checkpoint
        plan = plan_merge(sources.weighted, into)
    chosen = TokenizerChoice()
    if base.headers is None:
        chosen = choose_tokenizer(sources.adapters, plan, options.tokenizer)
        plan = replace(plan, files=_changed_files(plan, chosen))
    conversion = None if options.change is None else plan_conversion(checkpoint, options.change, plan)
    merged = tuple(
        MergedAdapter(adapter=found.reference, sha256=found.adapter.sha256, weight=each.weight)
        for found, each in zip(sources.adapters, sources.weighted, strict=True)
    )
    outcome = Outcome(target, base.name, merged, plan, conversion, in_place=options.writing.in_place, tokenizer=chosen)
    return plan, outcome


def _check(sources: _Sources, plan: MergePlan, catalogue: Registry, watcher: Progress,
           options: MergeOptions) -> tuple[dict[str, str] | None, list[str]]:  # fmt: skip
    """Check before anything is written what the plan does not: repeats, numbers, device, effect, base.

    Return the digests of the base's tensors (None if no fingerprint is recorded), and notes.

    Raises:
        LoratoolError: a check failed; the message says what is wrong.
    """
    allowed, stored = options.allowed, stored_of(plan.base)
    refuse_trained_beside([found.adapter for found in sources.adapters], without=allowed.without_extras)
    repeats = refuse_again(sources.adapters, stored, catalogue, watcher, again=allowed.again)
    for found in sources.adapters if options.writing.dry_run else ():  # a merge checks them when it reads them
        refuse_not_finite(found.adapter)
    if options.device.startswith("cuda"):
        choose_device(options.device)  # raises if there is none, before anything is copied
    no_ops = refuse_no_change(plan.adapters, allow=allowed.no_op)
    digests, notes = check_base(sources.base, sources.adapters, stored, catalogue, watcher, any_base=allowed.any_base)
    left_out = () if options.writing.in_place else inherited_files(plan.base).notes
    return digests, [*notes, *repeats, *no_ops, *plan.notes, *left_out]


def _apply(plan: MergePlan, outcome: Outcome, identity: BaseIdentity, options: MergeOptions,
           watcher: Progress) -> MergeReport:  # fmt: skip
    """Write the planned model: in another storage, in place, or to a new folder."""
    allowed, device, progress = options.allowed, options.device, watcher.advance
    check = delivery_check(plan, outcome.conversion, allow=allowed.no_op)
    if outcome.conversion is not None:
        watcher.begin("merging", outcome.conversion.read_bytes)
        return apply_conversion(outcome.conversion, outcome.out, identity, device=device, force=allowed.force, check=check,
                                progress=progress)  # fmt: skip
    if options.writing.in_place:
        watcher.begin("merging", plan.touched_bytes)
        return merge_in_place(plan, identity, device=device, check=check, progress=progress)
    watcher.begin("merging", sum(header.size for header in plan.base.headers))
    return apply_merge(plan, outcome.out, identity, device=device, undo=options.writing.undo, force=allowed.force, check=check,
                       progress=progress)  # fmt: skip


def _changed_files(plan: MergePlan, chosen: TokenizerChoice) -> FileChanges:
    """Return the changes of files beside the weights."""
    return chosen.files.joined(plan.base.files()) if isinstance(plan.base, UntiedCheckpoint) else chosen.files


def _output(out: str | os.PathLike[str] | None, base: ResolvedBase, adapters: Sequence[ResolvedAdapter],
            change: StorageChange | None) -> Path:  # fmt: skip
    """Return `out`, or ``<base>-<adapter>-...`` beside the base (in the working folder for a base in the Hub's cache)."""
    if out is not None:
        path = user_path(out)
        if path.suffix in SINGLE_FILE_SUFFIXES:
            raise OutputError(f"a merged model is a folder; give --out a folder's name instead of {quoted(path.name)}")
        return path
    ending = [] if change is None else ["dense" if change.making is None else change.making.storage]
    return beside_base(base.path, "-".join([base.name, *(found.label for found in adapters), *ending]))


def _refuse_away(base: ResolvedBase) -> None:
    """Raise OutputError for a base that is only on the Hub: there is nothing to change in place."""
    if base.headers is not None:
        raise OutputError(
            f"base {quoted(base.name)} is on the Hub and cannot be changed in place; merge with --out instead"
        )


def _refuse_in_place(checkpoint: Checkpoint) -> None:
    if not checkpoint.path.is_dir():
        raise OutputError(f"{quoted(checkpoint.path)} is a single file; only a model's own folder can change in place")
    refuse_links(checkpoint.path, [header.file for header in checkpoint.headers])
    adapter = next((name for name in checkpoint.other_files() if role_of(name) is FileRole.ADAPTER), None)
    if adapter is not None:
        raise OutputError(
            f"{quoted(checkpoint.path)} also holds {quoted(adapter)}, an adapter that transformers would apply on top of the "
            "merge; move it to a folder of its own, or merge with --out"
        )
