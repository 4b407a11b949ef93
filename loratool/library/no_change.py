"""Merges that would change nothing: said before, where the adapter's numbers tell, and after, where the written bytes do."""

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
    """A note on an adapter that changes nothing."""
    reason = why_no_change(adapter)
    return () if reason is None else (f"{quoted(adapter.name)} changes nothing: {reason}",)


def refuse_no_change(adapters: Sequence[WeightedAdapter], *, allow: bool) -> list[str]:
    """Check that each adapter changes something at its weight; notes on those that do not.

    Raises:
        NoChangeError: one changes nothing, and that is not allowed.
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
    """Check that a merge that is about to appear changed something.

    Raises:
        NoChangeError: every byte is what it would be without the merge, and that is not allowed.
    """
    if allow or len(manifest.unchanged) < len(plan.targets):
        return
    storages = ", ".join(sorted({target.weight.storage for target in plan.targets}))
    raise NoChangeError(
        f"the merge would change nothing: the update is smaller than the last digit of every {storages} number; merge into "
        f"a base of higher precision, give the adapter a larger weight, or give {ALLOW_NO_OP}"
    )


def unchanged_notes(unchanged: Sequence[str], plan: MergePlan) -> tuple[str, ...]:
    """A note on matrices that stayed as they were although the merge planned to change them."""
    if not unchanged:
        return ()
    more = f" and {len(unchanged) - 1:,} more" if unchanged[1:] else ""
    return (
        f"{len(unchanged):,} of {len(plan.targets):,} tensors kept the base's bytes ({quoted(unchanged[0])}{more}): their "
        "update is zero or was lost by rounding",
    )
