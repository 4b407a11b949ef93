"""`loratool.prune`: remove triplets from an AdaLoRA."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from loratool.checkpoint.staging import refuse_existing
from loratool.errors import LoratoolError, OutputError, quoted
from loratool.formats.adalora import IMPORTANCE
from loratool.formats.adapter_draft import Draft
from loratool.formats.alpha import Alpha
from loratool.formats.finite import refuse_not_finite
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
from loratool.library.resolving.resolve import resolve_adapter
from loratool.ranks.prune import Criterion, Limit, plan_prune, prune_to_lora
from loratool.ranks.prune import prune as prune_triplets
from registry import AdapterRecord, check_name

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class PruneResult:
    """A pruned AdaLoRA.

    Attributes:
        out: the file or folder that was written.
        record: its entry in the catalogue.
        parent: ``name@version`` of the adapter it was pruned from, or its name if it is not catalogued.
        criterion: the criterion by which triplets were ranked.
        before: number of triplets before pruning.
        total: number of triplets left.
        ranks: number of triplets left in each module; 0 for a module that lost all.
        notes: notes for the user.
    """

    out: Path
    record: AdapterRecord
    parent: str
    criterion: Criterion
    before: int
    total: int
    ranks: dict[str, int]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        return {
            "out": str(self.out),
            **adapter_json(self.record),
            "ranks": self.ranks,
            "parent": self.parent,
            "criterion": self.criterion,
            "before": self.before,
            "total": self.total,
            "notes": list(self.notes),
        }


def prune(adapter: PathLike, *, budget: int | None = None, average_rank: float | None = None,
          threshold: float | None = None, as_: Literal["adalora", "lora"] = "adalora", out: PathLike | None = None,
          name: str | None = None, alpha: Alpha | None = None, force: bool = False,
          registry: str | None = None) -> PruneResult:  # fmt: skip
    """Drop the least important triplets of an AdaLoRA, over all modules together, and catalogue the result as its child.

    Triplets are ranked by the importance scores in the file's facts, or else by ``|E|``. A module may fall to rank 0.

    Args:
        adapter: a catalogued name, a path or a Hub id.
        budget: exact number of triplets to keep.
        average_rank: alternative: average number of triplets per module. The budget is the number of modules times this,
            rounded down.
        threshold: alternative: keep the triplets whose score is above it.
        as_: ``adalora``, or ``lora`` for an ordinary LoRA with E multiplied into its factors.
        out: the new file (``.safetensors``, ``.st``) or folder; by default ``<adapter>-b64`` beside the adapter.
        name: its name in the catalogue; by default that of the file.
        alpha: alpha of a bare adapter file that does not state it: a number, or ``rank`` for each module's rank.
        force: replace an adapter that loratool wrote.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.

    Raises:
        LoratoolError, registry.RegistryError: the message says what is wrong; nothing is written.
    """
    limit = Limit(budget, average_rank, threshold)
    if as_ not in ("adalora", "lora"):
        raise LoratoolError(f"an adapter cannot be pruned to the kind {quoted(as_)}; give adalora or lora")
    if out is not None and not os.fspath(out):
        raise OutputError("the output's path is empty; give --out a folder or file")
    with open_registry(registry, read_only=True) as catalogue:
        source = resolve_adapter(adapter, catalogue, alpha)
        target = default_output(source, adapter, limit.suffix) if out is None else user_path(out)
        chosen = check_name(default_name(target) if name is None else name, "adapter")
        refuse_overlap(target, [source.adapter.file])
        refuse_existing(target, adapter_output(target), force=force)
        pruning = plan_prune(source.adapter, limit)
        refuse_not_finite(source.adapter)
        details = {"budget": pruning.total, "of": pruning.before, "by": pruning.criterion, "as": as_}
        facts = child_facts(as_, "prune", [source], details)
        if as_ == "adalora" and pruning.criterion == "importance":
            facts[IMPORTANCE] = {module: list(scores) for module, scores in pruning.scores.items()}
        with Draft(scratch_folder(target)) as draft:
            made = (prune_triplets if as_ == "adalora" else prune_to_lora)(draft, source.adapter, pruning)
            changes = {**made.changes, **source.adapter.replacements}
            whole = replace(made, facts=facts, changes=changes, own_base=source.adapter.own_base)
            child = Child(whole, target, chosen, details, named=name is not None)
            (added,) = bring_up([child], catalogue, "prune", [origin_of(source)], base=base_of([source]), force=force)
    return PruneResult(
        target,
        added.record,
        reference_of(source),
        pruning.criterion,
        pruning.before,
        pruning.total,
        {module: len(places) for module, places in pruning.kept.items()},
        added.notes,
    )
