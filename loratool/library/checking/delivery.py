"""Merges that deliver little of their update: refused before they are published, or noted."""

from __future__ import annotations

from functools import partial

from loratool.errors import NoChangeError
from loratool.library.checking.no_change import ALLOW_NO_OP, refuse_unchanged
from loratool.merging.apply import Check
from loratool.merging.conversion_plan import ConversionPlan
from loratool.merging.delivery import ENOUGH, LEAST
from loratool.merging.manifest import Manifest
from loratool.merging.plan import MergePlan
from loratool.weights.storages import is_dense, quantize_hint
from loratool.weights.stored import StoredWeight


def delivery_check(plan: MergePlan, conversion: ConversionPlan | None, *, allow: bool) -> Check:
    """Return the check of a finished merge that raises NoChangeError if it changed nothing or delivered too little."""
    return partial(_check, plan=plan, conversion=conversion, allow=allow)


def _check(manifest: Manifest, plan: MergePlan, conversion: ConversionPlan | None, *, allow: bool) -> None:
    refuse_unchanged(manifest, plan, allow=allow)
    delivery = manifest.delivery_of_all
    if allow or delivery is None or delivery.share >= LEAST:
        return
    raise NoChangeError(
        f"only {delivery.share:.0%} of the update would be left in the {_storages(manifest, plan, conversion)} weights, so "
        f"nothing was written; {', '.join(_what_helps(manifest, plan, conversion))}, or give {ALLOW_NO_OP}"
    )


def delivery_notes(manifest: Manifest, plan: MergePlan, conversion: ConversionPlan | None) -> tuple[str, ...]:
    """Return a note if a merge delivered less than `ENOUGH` of the update."""
    delivery = manifest.delivery_of_all
    if delivery is None or delivery.share >= ENOUGH:
        return ()
    return (
        f"only {delivery.share:.0%} of the update is left in the {_storages(manifest, plan, conversion)} weights; "
        f"{', or '.join(_what_helps(manifest, plan, conversion))}",
    )


def _losing(manifest: Manifest, plan: MergePlan) -> list[StoredWeight]:
    """Return the parameters of the base that lose most of their update."""
    shares = {name: delivery.share for name, delivery in manifest.delivery.items()}
    return [target.weight for target in plan.targets if shares.get(target.name, 1.0) < ENOUGH]


def _storages(manifest: Manifest, plan: MergePlan, conversion: ConversionPlan | None) -> str:
    """Return the names of the storages that lose most of the update."""
    if conversion is not None and conversion.change.making is not None:
        return conversion.change.making.storage
    losing = _losing(manifest, plan)
    return " and ".join(sorted({weight.dtype.title if conversion else weight.storage for weight in losing}))


def _what_helps(manifest: Manifest, plan: MergePlan, conversion: ConversionPlan | None) -> list[str]:
    """Return what can be done so that more of the update is delivered."""
    beside = "keep the adapter beside the model"
    if conversion is not None and conversion.change.making is not None:
        return ["merge into the dense base without quantizing it", beside]
    coarse = [weight for weight in _losing(manifest, plan) if not is_dense(weight)]
    if conversion is not None or not coarse:
        return ["merge into the base in fp32", beside]
    dense = f"merge into the full-precision base with --out{quantize_hint(coarse[0])} instead"
    calibrated = [weight for weight in coarse if weight.is_calibrated and not plan.calibration]
    return [dense, *(["round by --calibrate SAMPLES"] if calibrated else []), beside]
