"""Whether an adapter changes anything at all."""

from __future__ import annotations

from loratool.formats.adapter import Adapter


def why_no_change(adapter: Adapter) -> str | None:
    """Return why an adapter changes nothing in any base, or None if it may change something.

    Its numbers are read up to the first module that changes.
    """
    updates, ranked = adapter.changes.values(), adapter.ranked.values()
    if not updates or any(update.replaces for update in updates):
        return None
    if len(ranked) == len(updates) and all(update.scaling == 0 and not update.needs_weight for update in ranked):
        return "its alpha is 0"
    if all(update.vanishes() for update in updates):
        return "in every module one of its factors is all zeros, as before training"
    return None
