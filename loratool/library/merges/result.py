"""The result of `loratool.merge`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.library.checking.delivery import delivery_notes
from loratool.library.checking.no_change import unchanged_notes
from loratool.library.merges.tokenizer_choice import TokenizerChoice
from loratool.merging.conversion_plan import ConversionPlan
from loratool.merging.delivery import Delivery
from loratool.merging.manifest import Manifest
from loratool.merging.plan import MergePlan
from loratool.merging.undo import UNDO_NAME
from registry import MergedAdapter


@dataclass(frozen=True, slots=True)
class MergeResult:
    """The result of a merge, or with ``dry_run`` the expected result. Sizes are in bytes.

    Attributes:
        out: the merged model's folder.
        base: name of the base.
        base_fingerprint: of the base; None in a dry run that did not need it.
        adapters: each adapter's reference, sha256 and weight.
        output_fingerprint: of the merged model; None in a dry run.
        undo_file: the undo file, if one was kept.
        plan: the matrices that change.
        delivery: how much of the update the stored numbers carry, in total; None if only whole parameters were replaced.
        deliveries: the same for each parameter, by name.
        unchanged: names of planned tensors that kept the base's bytes, since their update is zero or was lost by rounding.
        seconds: the time taken, or expected.
        conversion: what is stored differently than in the base; None if nothing is.
        tokenizer: the sources of the tokenizer and the chat template.
    """

    out: Path
    base: str
    base_fingerprint: str | None
    adapters: tuple[MergedAdapter, ...]
    output_fingerprint: str | None
    undo_file: Path | None
    plan: MergePlan
    notes: tuple[str, ...]
    seconds: float
    dry_run: bool
    delivery: Delivery | None = None
    deliveries: Mapping[str, Delivery] = field(default_factory=dict)
    conversion: ConversionPlan | None = None
    unchanged: tuple[str, ...] = ()
    in_place: bool = False
    tokenizer: TokenizerChoice = field(default_factory=TokenizerChoice)

    @property
    def changed_tensors(self) -> int | None:
        """Number of planned tensors whose bytes differ from the base's; None in a dry run."""
        return None if self.dry_run else len(self.plan.targets) - len(self.unchanged)

    @property
    def output_size_bytes(self) -> int:
        """Bytes of tensors in the merged model."""
        return self.plan.base.nbytes if self.conversion is None else self.conversion.layout.nbytes

    def to_json(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        options = {} if self.conversion is None else self.conversion.change.to_options()
        return {
            "out": str(self.out),
            "base": self.base,
            "base_fingerprint": self.base_fingerprint,
            "adapters": [{"adapter": a.adapter, "sha256": a.sha256, "weight": a.weight} for a in self.adapters],
            "output_fingerprint": self.output_fingerprint,
            "undo_file": None if self.undo_file is None else str(self.undo_file),
            "tensors": [
                {
                    "name": target.name,
                    "update": list(target.kinds),
                    "codec": target.weight.storage,
                    "shape": list(target.weight.shape),
                    "size_bytes": target.nbytes,
                    **({"delivery": self.deliveries[target.name].to_json()} if target.name in self.deliveries else {}),
                }
                for target in self.plan.targets
            ],
            "delivery": None if self.delivery is None else self.delivery.to_json(),
            "changed_tensors": self.changed_tensors,
            "unchanged": list(self.unchanged),
            "touched_bytes": self.plan.touched_bytes,
            "size_bytes": self.plan.base.nbytes,
            "quantize": options.get("quantize"),
            "base_as": options.get("base_as"),
            "dequantize": "dequantize" in options,
            "output_size_bytes": self.output_size_bytes,
            "seconds": round(self.seconds, 3),
            "dry_run": self.dry_run,
            "tokenizer": self.tokenizer.to_json(),
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """The part of a merge's result that is known before the merge."""

    out: Path
    base: str
    adapters: tuple[MergedAdapter, ...]
    plan: MergePlan
    conversion: ConversionPlan | None
    in_place: bool
    tokenizer: TokenizerChoice = field(default_factory=TokenizerChoice)

    def of(self, manifest: Manifest, seconds: float, notes: Sequence[str]) -> MergeResult:
        """Return the result that the manifest describes."""
        return MergeResult(
            out=self.out,
            base=self.base,
            base_fingerprint=manifest.base_fingerprint,
            adapters=self.adapters,
            output_fingerprint=manifest.fingerprint,
            undo_file=None if manifest.undo is None else self.out / manifest.undo / UNDO_NAME,
            plan=self.plan,
            notes=(
                *notes,
                *unchanged_notes(manifest.unchanged, self.plan),
                *delivery_notes(manifest, self.plan, self.conversion),
            ),
            seconds=seconds,
            dry_run=False,
            in_place=self.in_place,
            tokenizer=self.tokenizer,
            delivery=manifest.delivery_of_all,
            deliveries=manifest.delivery,
            conversion=self.conversion,
            unchanged=manifest.unchanged,
        )

    def expected(self, base_fingerprint: str | None, seconds: float, notes: Sequence[str]) -> MergeResult:
        """Return the result of a dry run."""
        return MergeResult(
            out=self.out,
            base=self.base,
            base_fingerprint=base_fingerprint,
            adapters=self.adapters,
            output_fingerprint=None,
            undo_file=None,
            plan=self.plan,
            notes=tuple(notes),
            seconds=seconds,
            dry_run=True,
            in_place=self.in_place,
            conversion=self.conversion,
            tokenizer=self.tokenizer,
        )
