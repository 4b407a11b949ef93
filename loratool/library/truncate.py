"""`loratool.truncate`: cut an adapter to a lower rank."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from loratool.checkpoint.staging import refuse_existing
from loratool.errors import LoratoolError, OutputError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.adapter_draft import Draft
from loratool.formats.alpha import Alpha
from loratool.formats.finite import refuse_not_finite
from loratool.formats.kinds import kind_named
from loratool.formats.scaling_law import LAWS, ScalingLaw, scaling_law
from loratool.formats.write import adapter_output
from loratool.library.places.output_place import refuse_overlap
from loratool.library.places.user_path import user_path
from loratool.library.recording.derive import (
    Child,
    base_of,
    bring_up,
    child_facts,
    default_name,
    default_output,
    origin_of,
    reference_of,
    scratch_folder,
)
from loratool.library.recording.opening import open_registry
from loratool.library.reporting.adapter_json import adapter_json
from loratool.library.reporting.progress import Progress, Silent
from loratool.library.resolving.resolve import ResolvedAdapter, resolve_adapter
from loratool.ranks.truncate import Cut, Truncation, truncate_by_svd, truncate_leading
from registry import AdapterRecord, check_name

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class TruncateResult:
    """An adapter of lower rank.

    Attributes:
        out: the file or folder that was written.
        record: its entry in the catalogue.
        parent: ``name@version`` of the adapter it was cut from, or its name if it is not catalogued.
        method: ``leading`` for a DyLoRA's leading components, ``svd`` for the best approximation.
        scaling: scaling law of the leading components; None for svd.
        error: relative error of svd over all modules, in the Frobenius norm; None for leading components.
        errors: the same for each module.
        notes: notes for the user.
    """

    out: Path
    record: AdapterRecord
    parent: str
    method: Literal["leading", "svd"]
    scaling: ScalingLaw | None
    error: float | None
    errors: dict[str, float]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        return {
            "out": str(self.out),
            **adapter_json(self.record),
            "parent": self.parent,
            "method": self.method,
            "law": self.scaling,
            "error": self.error,
            "errors": self.errors,
            "notes": list(self.notes),
        }


def truncate(adapter: PathLike, *, rank: int | Sequence[int] | None = None, energy: float | None = None,
             error: float | None = None, svd: bool = False, scaling: str | None = None, out: PathLike | None = None,
             name: str | None = None, alpha: Alpha | None = None, force: bool = False, registry: str | None = None,
             progress: Progress | None = None) -> tuple[TruncateResult, ...]:  # fmt: skip
    """Cut an adapter to a lower rank, write it, and catalogue it as the adapter's child. Return one result per rank.

    A DyLoRA is cut to its leading components, bit for bit. Each module of any other low-rank adapter is replaced by its best
    approximation in the Frobenius norm (Eckart and Young 1936), computed from the factors.

    Args:
        adapter: a catalogued name, a path or a Hub id.
        rank: the new rank, or several. A module of lower rank keeps its rank.
        energy: alternative: share of each module's squared singular values to keep, by the smallest sufficient rank.
        error: alternative: largest relative error of each module, in the Frobenius norm.
        svd: cut a DyLoRA by its best approximation, too, as `energy` and `error` require.
        scaling: ``paper`` or ``kohya``: cut to the leading components under this law (`loratool.formats.scaling_law`),
            whatever the file says about its kind and origin.
        out: the new file (``.safetensors``, ``.st``) or folder; with several ranks ``-r4`` is added to its name. By default
            ``<adapter>-r4`` beside the adapter.
        name: its name in the catalogue, with the same addition; by default that of the file.
        alpha: alpha of a bare adapter file that does not state it: a number, or ``rank`` for each module's rank.
        force: replace an adapter that loratool wrote.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.
        progress: receives the number of bytes of factors done.

    Raises:
        LoratoolError, registry.RegistryError: the message says what is wrong; nothing is written.
    """
    cuts = _cuts(rank, energy, error)
    with open_registry(registry, read_only=True) as catalogue:
        source = resolve_adapter(adapter, catalogue, alpha)
        law = _law(source.adapter, cuts, svd=svd, scaling=scaling)
        outs = [_output(out, source, adapter, cut.suffix, several=len(cuts) > 1) for cut in cuts]
        names = [_name(name, target, cut.suffix, several=len(cuts) > 1) for target, cut in zip(outs, cuts, strict=True)]
        for target in outs:
            refuse_overlap(target, [source.adapter.file])
            refuse_existing(target, adapter_output(target), force=force)
        with ExitStack() as stack:
            drafts = [stack.enter_context(Draft(scratch_folder(target))) for target in outs]
            found = _truncated(drafts, source.adapter, cuts, law, progress or Silent())
            children = [
                replace(_child(truncation, source, cut, law, target, chosen), named=name is not None)
                for truncation, cut, target, chosen in zip(found, cuts, outs, names, strict=True)
            ]
            added = bring_up(children, catalogue, "truncate", [origin_of(source)], base=base_of([source]), force=force)
    parent = reference_of(source)
    method: Literal["leading", "svd"] = "svd" if law is None else "leading"
    return tuple(
        TruncateResult(
            target, entry.record, parent, method, law, truncation.error, dict(truncation.errors), entry.notes
        )
        for target, entry, truncation in zip(outs, added, found, strict=True)
    )


def _cuts(rank: int | Sequence[int] | None, energy: float | None, error: float | None) -> list[Cut]:
    if rank is None or isinstance(rank, int):
        return [Cut(rank, energy, error)]
    ranks = list(dict.fromkeys(rank))
    if not ranks:
        raise LoratoolError("there is no rank to cut to; name at least one")
    return [Cut(each, energy, error) for each in ranks]


def _law(adapter: Adapter, cuts: Sequence[Cut], *, svd: bool, scaling: str | None) -> ScalingLaw | None:
    """Return the scaling law for leading components, or None for an SVD.

    Raises:
        LoratoolError: options contradict each other.
    """
    if scaling is not None:
        if svd:
            raise LoratoolError("--scaling is for leading components and --svd takes none; give one of them")
        law = next((each for each in LAWS if each == scaling), None)
        if law is None:
            raise LoratoolError(f"{quoted(scaling, 40)} is not a scaling law; give {' or '.join(LAWS)}")
    elif svd or not kind_named(adapter.kind).nested:
        return None
    else:
        law = scaling_law(adapter.facts, adapter.name)
    if any(cut.rank is None for cut in cuts):
        raise LoratoolError(
            f"the leading components of {quoted(adapter.name)} are not approximations, so --energy and --error do not apply to "
            "them; give --rank, or --svd"
        )
    return law


def _output(out: PathLike | None, source: ResolvedAdapter, given: PathLike, suffix: str, *, several: bool) -> Path:
    if out is None:
        return default_output(source, given, suffix)
    if not os.fspath(out):
        raise OutputError("the output's path is empty; give --out a folder or file")
    target = user_path(out)
    if several and not target.name:
        raise OutputError(f"{quoted(out)} is an existing folder; give --out a new name")
    return target.with_name(f"{target.stem}-{suffix}{target.suffix}") if several else target


def _name(name: str | None, out: Path, suffix: str, *, several: bool) -> str:
    chosen = default_name(out) if name is None else f"{name}-{suffix}" if several else name
    return check_name(chosen, "adapter")


def _truncated(drafts: Sequence[Draft], adapter: Adapter, cuts: Sequence[Cut], law: ScalingLaw | None,
               watcher: Progress) -> list[Truncation]:  # fmt: skip
    if law is None:
        watcher.begin("decomposing", sum(i.nbytes for u in adapter.ranked.values() for i in u.tensors.values()))
        return truncate_by_svd(drafts, adapter, cuts, watcher.advance)
    refuse_not_finite(adapter)
    return [
        truncate_leading(draft, adapter, cut.rank or adapter.rank or 0, law)
        for draft, cut in zip(drafts, cuts, strict=True)
    ]


def _child(
    truncation: Truncation, source: ResolvedAdapter, cut: Cut, law: ScalingLaw | None, out: Path, name: str
) -> Child:
    """Return a truncation with its facts, output and name."""
    own = {} if law is None else {"scaling": law}
    figures = {"method": "svd", "lost": truncation.error} if law is None else {"method": "leading", **own}
    details = cut.figures | figures
    facts = child_facts(truncation.adapter.kind, "truncate", [source], details) | own
    adapter = replace(
        truncation.adapter,
        facts=facts,
        changes={**truncation.adapter.changes, **source.adapter.replacements},
        own_base=source.adapter.own_base,
    )
    return Child(adapter, out, name, details)
