"""`loratool.quantize`: store a dense model in NF4."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loratool.checkpoint.dtypes import DENSE, DTYPES
from loratool.checkpoint.inheritance import inherited_files
from loratool.checkpoint.output_kind import OutputKind
from loratool.checkpoint.staging import refuse_no_text
from loratool.errors import LoratoolError, quoted
from loratool.library.checking.right_base import check_base, refuse_changed
from loratool.library.places.holding import hold
from loratool.library.places.home_folder import remember
from loratool.library.places.output_place import beside_base, refuse_or_note_existing, refuse_overlap
from loratool.library.places.user_path import user_path
from loratool.library.recording.model_entry import add_variant
from loratool.library.recording.opening import open_registry
from loratool.library.recording.promised import Promised, PromisedVariant
from loratool.library.reporting.progress import Progress, Silent
from loratool.library.resolving.resolve import ResolvedBase, resolve_base
from loratool.merging.apply import BaseIdentity, MergeReport, apply_conversion
from loratool.merging.conversion_plan import ConversionPlan, StorageChange, plan_conversion
from loratool.weights.storages import MAKINGS, QUANTIZED_TO
from registry import Registry, RegistryError, check_name, is_name

COMPUTE_DTYPES: Final = {DTYPES[name].title: DTYPES[name].torch_name for name in DENSE}
"""Names in torch of the dtypes that a quantized model may compute in, by the user's name for them."""


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """The result of a quantization, or with ``dry_run`` the expected result. Sizes are in bytes.

    Attributes:
        out: the quantized model's folder.
        name: its name in the catalogue; None if it was not catalogued.
        base: name of the base.
        base_fingerprint: of the base; None in a dry run.
        output_fingerprint: of the quantized model; None in a dry run.
        plan: the matrices that are quantized.
        seconds: the time taken.
    """

    out: Path
    name: str | None
    base: str
    base_fingerprint: str | None
    output_fingerprint: str | None
    plan: ConversionPlan
    notes: tuple[str, ...]
    seconds: float
    dry_run: bool

    @property
    def title(self) -> str:
        """Name of the storage in messages."""
        return self.plan.change.making.title if self.plan.change.making else ""

    def to_json(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        return {
            "out": str(self.out),
            "name": self.name,
            "base": self.base,
            "base_fingerprint": self.base_fingerprint,
            "output_fingerprint": self.output_fingerprint,
            **(self.plan.change.making.options if self.plan.change.making else {}),
            "tensors": [
                {
                    "name": each.name,
                    "codec": each.source.storage,
                    "shape": list(each.dense.shape),
                    "size_bytes": each.nbytes,
                }
                for each in self.plan.conversions
            ],
            "base_size_bytes": self.plan.base.nbytes,
            "size_bytes": self.plan.layout.nbytes,
            "seconds": round(self.seconds, 3),
            "dry_run": self.dry_run,
            "notes": list(self.notes),
        }


def quantize(base: str | os.PathLike[str], *, out: str | os.PathLike[str] | None = None, name: str | None = None,
             blocksize: int = 64, double_quant: bool = True, compute_dtype: str | None = None, dry_run: bool = False,
             force: bool = False, any_base: bool = False, registry: str | None = None,
             progress: Progress | None = None) -> QuantizeResult:  # fmt: skip
    """Store the linear modules of a dense model in NF4, with the bits that bitsandbytes gives on a CPU.

    transformers loads the result as a 4-bit model. If the base is catalogued, the result is catalogued as a variant of it.

    Args:
        base: a catalogued name, a folder, or a Hub id.
        out: the new folder; by default ``<base>-nf4`` beside the base.
        name: name of the result in the catalogue; by default ``<base>-nf4`` if the base is catalogued.
        blocksize: number of elements that share a scale: 32, 64, 128, ... 4096.
        double_quant: whether the scales are quantized to 8 bits, too.
        compute_dtype: dtype in which programs multiply: ``fp32``, ``fp16`` or ``bf16``; by default the base's own.
        dry_run: plan and check only; write nothing.
        force: replace a quantized model that loratool wrote.
        any_base: quantize a base that has changed since it was catalogued.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.
        progress: receives the number of bytes done.

    Raises:
        LoratoolError, registry.RegistryError: the message says what is wrong; nothing is written.
    """
    started, watcher = time.monotonic(), progress or Silent()
    change = _storage_change(blocksize, compute_dtype, double_quant=double_quant)
    if name is not None:
        check_name(name, "base")
    with open_registry(registry, read_only=True) as catalogue:
        source = resolve_base(base, catalogue, watcher, download=not dry_run)
        target = beside_base(source.path, f"{source.name}-{QUANTIZED_TO}") if out is None else user_path(out)
        _refuse_paths(source.path, target)
        _refuse_taken(name, target, catalogue)
        with hold(source.path, exclusive=False):
            plan = plan_conversion(source.open(), change)
            digests = _check_before_replacing(source, plan, target, catalogue, watcher, any_base=any_base)
            notes = [*inherited_files(plan.base).notes]
            notes += refuse_or_note_existing(target, OutputKind.QUANTIZED_MODEL, force=force, dry_run=dry_run)
            if dry_run:
                return _result(target, name, source, plan, None, notes, started)
            watcher.begin("quantizing", plan.read_bytes)
            with Promised(_promise(name, source, target), catalogue) as promised:
                report, changed = _apply(plan, source, target, digests, watcher, force=force, any_base=any_base)
                chosen, failed = _catalogued(name, source, target, report, plan, catalogue, promised)
    return _result(target, chosen, source, plan, report, [*notes, *changed, *failed], started)


def _refuse_paths(source: Path, target: Path) -> None:
    """Raise LoratoolError if the base's path cannot be recorded, or the output would be in it or over it."""
    refuse_no_text([source])
    refuse_overlap(target, [source])


def _check_before_replacing(source: ResolvedBase, plan: ConversionPlan, target: Path, catalogue: Registry, watcher: Progress,
                            *, any_base: bool) -> Mapping[str, str] | None:  # fmt: skip
    """Check the base before an existing output, since a wrong base is the greater mistake; return its tensors' digests.

    If there is no output yet, the base is checked while it is read, and this returns None.

    Raises:
        WrongBaseError: the base has changed since it was catalogued.
    """
    if not os.path.lexists(target):
        return None
    digests, _ = check_base(source, (), plan.base, catalogue, watcher, any_base=any_base)
    return digests


def _apply(plan: ConversionPlan, source: ResolvedBase, target: Path, digests: Mapping[str, str] | None, watcher: Progress, *,
           force: bool, any_base: bool) -> tuple[MergeReport, list[str]]:  # fmt: skip
    """Write the quantized model; return the report, and notes on a base that has changed.

    Raises:
        WrongBaseError: the base has changed since it was catalogued; nothing is written.
    """
    notes: list[str] = []
    report = apply_conversion(
        plan,
        target,
        BaseIdentity(source.name, digests),
        force=force,
        check=lambda made: notes.extend(refuse_changed(source, made.base_fingerprint, any_base=any_base)),
        progress=watcher.advance,
    )
    if not digests:
        remember(plan.base, report.base_digests)
    return report, notes


def _result(out: Path, name: str | None, source: ResolvedBase, plan: ConversionPlan, report: MergeReport | None,
            notes: Iterable[str], started: float) -> QuantizeResult:  # fmt: skip
    """Return the result; without a `report` that of a dry run."""
    return QuantizeResult(
        out=out,
        name=name,
        base=source.name,
        base_fingerprint=None if report is None else report.manifest.base_fingerprint,
        output_fingerprint=None if report is None else report.manifest.fingerprint,
        plan=plan,
        notes=tuple(notes),
        seconds=time.monotonic() - started,
        dry_run=report is None,
    )


def _storage_change(blocksize: int, compute_dtype: str | None, *, double_quant: bool) -> StorageChange:
    making = MAKINGS[QUANTIZED_TO]({"blocksize": blocksize, "double_quant": double_quant})
    if compute_dtype not in (None, *COMPUTE_DTYPES):
        raise LoratoolError(f"{quoted(compute_dtype)} is not a dtype to compute in; use fp32, fp16 or bf16")
    computed_in = None if compute_dtype is None else COMPUTE_DTYPES[compute_dtype]
    return StorageChange("quantize", making, computed_in)


def _refuse_taken(name: str | None, target: Path, catalogue: Registry) -> None:
    """Raise LoratoolError, before minutes are spent, if another model has the chosen name."""
    record = catalogue.bases.get(name) if name else None
    if record is not None and record.path != target.absolute():
        raise LoratoolError(f"the base {quoted(name)} is in the catalogue already; choose another --name")


def _promise(name: str | None, source: ResolvedBase, out: Path) -> PromisedVariant:
    """Return the promise of the entry that `_catalogued` makes when the model is written."""
    record = source.record
    default, base = f"{source.name}-{QUANTIZED_TO}", record.name if record else source.name
    return PromisedVariant.of(out, name, default, base, record.fingerprint if record else None)


def _catalogued(name: str | None, source: ResolvedBase, out: Path, report: MergeReport, plan: ConversionPlan,
                catalogue: Registry, promised: Promised) -> tuple[str | None, tuple[str, ...]]:  # fmt: skip
    """Catalogue the result; return its name and notes. Since the model is written, a failure gives only a note."""
    record = source.record
    is_known = record is not None and record.fingerprint == report.manifest.base_fingerprint
    chosen = name or (f"{source.name}-{QUANTIZED_TO}" if is_known else None)
    if chosen is None or not is_name(chosen):
        return None, ()
    try:
        with catalogue.for_writing() as writable:
            added = add_variant(
                writable,
                chosen,
                out,
                plan.base,
                fingerprint=report.manifest.fingerprint,
                variant_of=record.name if record is not None and is_known else None,
                size_bytes=plan.layout.nbytes,
                dtype=QUANTIZED_TO,
            )
    except RegistryError as error:
        promised.postpone(error)
        return None, (f"the model is written but not catalogued: {error}",)
    return added.name, ()
