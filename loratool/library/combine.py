"""`loratool.combine`: several adapters into one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.checkpoint.staging import refuse_existing
from loratool.errors import OutputError, WrongBaseError, quoted
from loratool.formats.adapter_draft import Draft
from loratool.formats.alpha import Alpha
from loratool.formats.write import adapter_output
from loratool.library.checking.right_base import ANY_BASE
from loratool.library.places.output_place import refuse_overlap
from loratool.library.places.user_path import user_path
from loratool.library.recording.derive import (
    Child,
    base_of,
    bring_up,
    child_facts,
    default_name,
    origin_of,
    reference_of,
    scratch_folder,
)
from loratool.library.recording.opening import open_registry
from loratool.library.reporting.adapter_json import adapter_json
from loratool.library.reporting.progress import Progress, Silent
from loratool.library.resolving.adapter_spec import AdapterSpec, PathLike, with_weight
from loratool.library.resolving.resolve import ResolvedAdapter, resolve_at_rank
from loratool.ranks.combine import Combination, Share, combine_into, plan_combine
from loratool.ranks.methods import Method, Recipe
from loratool.ranks.unit_scaling import common_targeting, unit_config
from registry import AdapterRecord, Registry, check_name


@dataclass(frozen=True, slots=True)
class CombineResult:
    """A combination of adapters.

    Attributes:
        out: the file or folder that was written.
        record: its entry in the catalogue.
        parents: ``name@version`` (or the name, if not catalogued) and weight of each adapter it was made from.
        recipe: the method, with its density, rank and seed.
        error: relative error of ``svd`` against the exact weighted sum, in the Frobenius norm; None for other methods.
        notes: notes for the user.
    """

    out: Path
    record: AdapterRecord
    parents: tuple[tuple[str, float], ...]
    recipe: Recipe
    error: float | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        return {
            "out": str(self.out),
            **adapter_json(self.record),
            "parents": [{"adapter": adapter, "weight": weight} for adapter, weight in self.parents],
            "method": self.recipe.method,
            "density": self.recipe.density,
            "seed": self.recipe.seed,
            "error": self.error,
            "notes": list(self.notes),
        }


def combine(adapters: Sequence[AdapterSpec], method: Method, *, out: PathLike, density: float | None = None,
            rank: int | None = None, seed: int | None = None, name: str | None = None, alpha: Alpha | None = None,
            force: bool = False, any_base: bool = False, registry: str | None = None,
            progress: Progress | None = None) -> CombineResult:  # fmt: skip
    """Combine several adapters into one, with the numbers of PEFT's ``add_weighted_adapter``, and catalogue it as their child.

    Args:
        adapters: catalogued names, paths or Hub ids, each alone or as (adapter, weight). Weights may be negative. A DyLoRA
            has its full rank, or rank b as ``ADAPTER@rank=b``.
        method: ``linear``, ``cat``, ``svd``, ``ties``, ``dare-linear``, ``dare-ties`` or ``magnitude-prune``; see
            `loratool.ranks.methods`.
        out: the new file (``.safetensors``, ``.st``) or PEFT folder. Its factors are fp32, its scaling is 1.
        density: share of each factor's numbers that is kept, for the last four methods.
        rank: rank of the result of ``svd``; by default the largest of the adapters.
        seed: seed of the two dare methods; by default made from the inputs, so that equal inputs give equal bytes.
        name: name of the result in the catalogue; by default that of the file.
        alpha: alpha of a bare adapter file that does not state it: a number, or ``rank`` for each module's rank.
        force: replace an adapter that loratool wrote.
        any_base: combine adapters that record different bases.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.
        progress: receives the number of bytes of factors done.

    Raises:
        LoratoolError: the message says what is wrong; nothing is written.
        registry.RegistryError: the catalogue cannot be read, or cannot take the result.
    """
    if not os.fspath(out):
        raise OutputError("the output's path is empty; give --out a folder or file")
    target = user_path(out)
    chosen = check_name(default_name(target) if name is None else name, "adapter")
    specs = [with_weight(spec) for spec in adapters]
    watcher = progress or Silent()
    with open_registry(registry, read_only=True) as catalogue:
        found = [resolve_at_rank(given, catalogue, alpha) for given, _ in specs]
        refuse_overlap(target, [parent.adapter.file for parent in found])
        notes = _check_bases(found, catalogue, any_base=any_base)
        refuse_existing(target, adapter_output(target), force=force)
        shares = [Share(parent.adapter, weight) for parent, (_, weight) in zip(found, specs, strict=True)]
        plan = plan_combine(shares, Recipe(method, density, rank, seed))
        figures = _figures(plan, [parent.rank for parent in found])
        watcher.begin("combining", plan.nbytes)
        with Draft(scratch_folder(target)) as draft:
            error = combine_into(draft, plan, watcher.advance)
            adapter = draft.adapter(chosen, _config(plan), child_facts("lora", "combine", found, figures))
            adapter = replace(adapter, layout=shares[0].adapter.layout)
            child = Child(adapter, target, chosen, figures | ({} if error is None else {"lost": error}),
                          named=name is not None)  # fmt: skip
            origins = [origin_of(parent) for parent in found]
            (added,) = bring_up([child], catalogue, "combine", origins, base=base_of(found), force=force)
    parents = tuple((reference_of(parent), share.weight) for parent, share in zip(found, shares, strict=True))
    return CombineResult(target, added.record, parents, plan.recipe, error, (*notes, *plan.notes, *added.notes))


def _check_bases(found: Sequence[ResolvedAdapter], catalogue: Registry, *, any_base: bool) -> tuple[str, ...]:
    """Return notes on adapters that may belong to different bases.

    Raises:
        WrongBaseError: two adapters record different bases, and `any_base` is off.
    """
    notes: dict[str, None] = {}
    for place, left in enumerate(found):
        for right in found[place + 1 :]:
            problem = _base_problem(left, right, catalogue)
            if problem is not None and not any_base:
                raise WrongBaseError(
                    f"{problem}; combine adapters of one base, or give {ANY_BASE} if these are one model"
                )
            if problem is not None:
                notes[f"{problem}; combined all the same, with {ANY_BASE}"] = None
    unknown = [parent.adapter.name for parent in found if parent.base_fingerprint is None]
    if unknown and len(found) > 1:
        notes[f"{quoted(unknown[0])} records no base fingerprint: it was matched by names and shapes"] = None
    return tuple(notes)


def _base_problem(left: ResolvedAdapter, right: ResolvedAdapter, catalogue: Registry) -> str | None:
    """Return why two adapters seem to belong to different bases, by fingerprint or else by recorded name; None if not."""
    names = quoted(left.adapter.name), quoted(right.adapter.name)
    mine, other = left.base_fingerprint, right.base_fingerprint
    if mine and other:
        if catalogue.bases.same_family(mine, other):
            return None
        return f"{names[0]} belongs to the base {mine[:12]}… and {names[1]} to {other[:12]}…"
    recorded = left.adapter.base_model, right.adapter.base_model
    if None in recorded or recorded[0] == recorded[1]:
        return None
    return f"{names[0]} names {quoted(recorded[0])} as its base and {names[1]} names {quoted(recorded[1])}"


def _config(plan: Combination) -> dict[str, Any]:
    configs = [share.adapter.config for share in plan.shares]
    whole = all(len(places) == len(plan.shares) for places in plan.holders.values())
    same = whole and all(plan.holders.keys() == share.adapter.ranked.keys() for share in plan.shares)
    targeting = common_targeting(configs, plan.ranks) if same else {"target_modules": sorted(plan.ranks)}
    return unit_config(plan.ranks, targeting, configs[0])


def _figures(plan: Combination, chosen: Sequence[int | None]) -> dict[str, Any]:
    """Return the details of the operation for the catalogue. `chosen` holds the chosen ranks of DyLoRAs."""
    recipe = plan.recipe
    given = {"density": recipe.density, "rank": recipe.rank, "seed": recipe.seed}
    weights = [
        {"sha256": share.adapter.sha256, "weight": share.weight} | ({} if rank is None else {"rank": rank})
        for share, rank in zip(plan.shares, chosen, strict=True)
    ]
    return {"method": recipe.method, "weights": weights} | {
        key: each for key, each in given.items() if each is not None
    }
