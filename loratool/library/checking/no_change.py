"""Merges that change nothing: recognized from the adapter's numbers before the merge, or from the written bytes after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from loratool.errors import NoChangeError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.no_change import why_no_change
from loratool.merging.manifest import Manifest
from loratool.merging.plan import MergePlan, WeightedAdapter

ALLOW_NO_OP: Final = "--allow-no-op"


def no_change_notes(adapter: Adapter) -> tuple[str, ...]:
    """Return a note if an adapter changes nothing."""
    reason = why_no_change(adapter)
    return () if reason is None else (f"{quoted(adapter.name)} changes nothing: {reason}",)


def refuse_no_change(adapters: Sequence[WeightedAdapter], *, allow: bool) -> list[str]:
    """Check that each adapter changes something at its weight; return notes on those that do not.

    Raises:
        NoChangeError: an adapter changes nothing, and `allow` is off.
    """
    notes = []
    for weighted in adapters:
        reason = "its weight is 0" if weighted.weight == 0 else why_no_change(weighted.adapter)
        if reason is None:
            continue
        problem = f"{quoted(weighted.adapter.name)} changes nothing: {reason}"
        if not allow:
            raise NoChangeError(f"{problem}; leave it out, or give {ALLOW_NO_OP}")
        notes.append(problem)
    return notes


def refuse_unchanged(manifest: Manifest, plan: MergePlan, *, allow: bool) -> None:
    """Check that a merge changed something, before its output appears.

    Raises:
        NoChangeError: no byte changed, and `allow` is off.
    """
    if allow or len(manifest.unchanged) < len(plan.targets):
        return
    storages = ", ".join(sorted({target.weight.storage for target in plan.targets}))
    larger = all(planned.update.scalable for target in plan.targets for planned in target.updates)
    weight = " give the adapter a larger weight," if larger else ""
    raise NoChangeError(
        f"the merge would change nothing: the update is smaller than the last digit of every {storages} number; merge into "
        f"a base of higher precision,{weight} or give {ALLOW_NO_OP}"
    )


def unchanged_notes(unchanged: Sequence[str], plan: MergePlan) -> tuple[str, ...]:
    """Return a note on matrices that the merge planned to change but that kept their bytes."""
    if not unchanged:
        return ()
    more = f" and {len(unchanged) - 1:,} more" if unchanged[1:] else ""
    return (
        f"{len(unchanged):,} of {len(plan.targets):,} tensors kept the base's bytes ({quoted(unchanged[0])}{more}): their "
        "update is zero or was lost by rounding",
    )
