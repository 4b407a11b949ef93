"""`loratool.extract`: turn a fine-tuned model and its base into an adapter."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.checkpoint.fingerprint import fingerprint, tensor_digests
from loratool.checkpoint.model import Checkpoint
from loratool.checkpoint.staging import refuse_existing
from loratool.errors import OutputError, quoted
from loratool.formats.adapter_draft import Draft
from loratool.formats.write import adapter_output
from loratool.library.checking.right_base import refuse_changed
from loratool.library.places.holding import hold
from loratool.library.places.home_folder import digest_cache
from loratool.library.places.output_place import refuse_overlap
from loratool.library.places.user_path import HUB_ID, user_path
from loratool.library.recording.derive import Child, Origin, bring_up, default_name, scratch_folder
from loratool.library.recording.opening import open_registry
from loratool.library.reporting.adapter_json import adapter_json
from loratool.library.reporting.progress import Progress, Silent
from loratool.library.resolving.adapter_spec import PathLike
from loratool.library.resolving.resolve import ResolvedBase, resolve_base
from loratool.ranks.extract import Extraction, ExtractPlan, extract_into, plan_extract
from loratool.ranks.low_rank_fit import Wanted
from loratool.ranks.unit_scaling import unit_config
from registry import AdapterRecord, check_name


@dataclass(frozen=True, slots=True)
class ExtractResult:
    """An adapter made from the difference of two models.

    Attributes:
        out: the file or folder that was written.
        record: its entry in the catalogue.
        tuned: the fine-tuned model's name.
        base: the base's name.
        extraction: ranks, errors, and the tensors that the adapter leaves out.
        notes: notes for the user.
    """

    out: Path
    record: AdapterRecord
    tuned: str
    base: str
    extraction: Extraction
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        found = self.extraction
        return {
            "out": str(self.out),
            **adapter_json(self.record),
            "tuned": self.tuned,
            "error": found.error,
            "errors": dict(found.errors),
            "randomized": list(found.randomized),
            "unchanged": found.unchanged,
            "left_out": list(found.left_out),
            "kept": list(found.kept),
            "notes": list(self.notes),
        }


def extract(tuned: PathLike, base: PathLike, *, out: PathLike, rank: int | None = None, energy: float | None = None,
            keep_full: bool = False, name: str | None = None, force: bool = False, any_base: bool = False,
            registry: str | None = None, progress: Progress | None = None) -> ExtractResult:  # fmt: skip
    """Make an adapter from the difference of a fine-tuned model and its base, and catalogue it as a child of the model.

    Each linear layer that changed gets the best factors of its rank. The stated error is measured on these factors.

    Args:
        tuned: the fine-tuned model: a catalogued name, a folder, a safetensors file, or a Hub id; fp32, fp16 or bf16.
        base: the model that it was made from, given in the same way.
        out: the new file (``.safetensors``, ``.st``) or PEFT folder. Its factors are fp32, its scaling is 1.
        rank: rank of every module, or less if its matrix is smaller.
        energy: an alternative to `rank`: each module gets the smallest rank that keeps this share, above 0 and at most 1, of
            the squared Frobenius norm of its difference.
        keep_full: keep other modules that changed (norms, embeddings, biases) whole, as PEFT's ``modules_to_save`` does.
            Without it they are left out and reported.
        name: name of the result in the catalogue; by default that of the file.
        force: replace an adapter that loratool wrote.
        any_base: continue if a catalogued model has changed. The adapter then belongs to the model as it is now.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.
        progress: receives the number of bytes done.

    Raises:
        LoratoolError: the message says what is wrong; nothing is written.
        registry.RegistryError: the catalogue cannot be read, or cannot take the result.
    """
    if not os.fspath(out):
        raise OutputError("the output's path is empty; give --out a folder or file")
    target = user_path(out)
    chosen = check_name(default_name(target) if name is None else name, "adapter")
    watcher, wanted = progress or Silent(), Wanted(rank, energy)
    with open_registry(registry, read_only=True) as catalogue, ExitStack() as held:
        models = [resolve_base(given, catalogue, watcher) for given in (tuned, base)]
        refuse_overlap(target, [model.path for model in models])
        for path in dict.fromkeys(model.path.resolve() for model in models):
            held.enter_context(hold(path, exclusive=False))
        checkpoints = [Checkpoint.open(model.path) for model in models]
        plan = plan_extract(checkpoints[0], checkpoints[1], wanted)
        fingerprints = [_fingerprint(checkpoint, watcher) for checkpoint in checkpoints]
        changed = [refuse_changed(each, now, any_base=any_base) for each, now in zip(models, fingerprints, strict=True)]
        refuse_existing(target, adapter_output(target), force=force)
        watcher.begin("extracting", plan.nbytes)
        with Draft(scratch_folder(target)) as draft:
            found = extract_into(draft, plan, wanted, keep_full=keep_full, progress=watcher.advance)
            figures = _figures(wanted, found, fingerprints[0])
            facts = {
                "schema": 1,
                "kind": "lora",
                "base_fingerprint": fingerprints[1],
                "lineage": {"operation": "extract", "tuned": models[0].name, **figures},
            }
            adapter = draft.adapter(chosen, _config(plan, found, models[1]), facts)
            whole = replace(adapter, changes={**adapter.changes, **found.kept})
            child = Child(whole, target, chosen, figures, named=name is not None)
            owner = models[1].record.name if models[1].record and not changed[1] else None
            origin = Origin(models[0].name, states=tuple(state for model in checkpoints for state in model.states))
            (added,) = bring_up([child], catalogue, "extract", [origin], base=owner, force=force)
    notes = (*changed[0], *changed[1], *_left_out_notes(found), *added.notes)
    return ExtractResult(target, added.record, models[0].name, models[1].name, found, notes)


def _fingerprint(checkpoint: Checkpoint, watcher: Progress) -> str:
    watcher.begin("fingerprinting", checkpoint.nbytes)
    return fingerprint(checkpoint.tensors, tensor_digests(checkpoint, digest_cache(), progress=watcher.advance))


def _config(plan: ExtractPlan, found: Extraction, base: ResolvedBase) -> dict[str, Any]:
    """Return the configuration, with short target names if they match no other layer of the model."""
    modules = found.ranks.keys()
    leaves = {module.rsplit(".", 1)[-1] for module in modules}
    chosen = {module for module in plan.linear if module.rsplit(".", 1)[-1] in leaves}
    source = base.record.source if base.record else ""
    belongs = {
        "fan_in_fan_out": any(plan.linear[module].transposed for module in modules),
        "base_model_name_or_path": source if HUB_ID.fullmatch(source) else None,
    }
    targeting = {"target_modules": sorted(leaves if chosen == modules else modules)}
    saved = {"modules_to_save": list(found.kept_modules)} if found.kept else {}
    return unit_config(found.ranks, targeting | saved, belongs)


def _figures(wanted: Wanted, found: Extraction, tuned_fingerprint: str) -> dict[str, Any]:
    """Return the details of the operation for the catalogue."""
    size = {"rank": wanted.rank} if wanted.rank is not None else {"energy": wanted.share}
    return size | {
        "lost": found.error,
        "randomized": len(found.randomized),
        "left_out": len(found.left_out),
        "kept": len(found.kept),
        "tuned_fingerprint": tuned_fingerprint,
    }


def _left_out_notes(found: Extraction) -> tuple[str, ...]:
    if not found.left_out:
        return ()
    listed = ", ".join(quoted(name) for name in found.left_out[:3])
    more = f" and {len(found.left_out) - 3} more" if len(found.left_out) > 3 else ""
    return (f"tensors that no LoRA can hold changed as well and are left out: {listed}{more}; --keep-full keeps them",)
