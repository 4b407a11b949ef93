"""Families of bases that are one model: those with equal fingerprints, and declared variants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Family(NamedTuple):
    """The ids and fingerprints of bases that are one model, in one or several storages."""

    ids: frozenset[int]
    fingerprints: frozenset[str]


def relatives(
    rows: Sequence[tuple[int, int | None, str | None]],
    *,
    base_id: int | None = None,
    fingerprint: str | None = None,
) -> Family:
    """Return the family of the base `base_id`, or of bases with `fingerprint`, in rows of (id, variant_of, fingerprint)."""
    ids = set() if base_id is None else {base_id}
    fingerprints = set() if fingerprint is None else {fingerprint}
    while True:
        roots = {variant_of or own for own, variant_of, found in rows if own in ids or found in fingerprints}
        wider = ids | {own for own, variant_of, _ in rows if (variant_of or own) in roots}
        more = fingerprints | {found for own, _, found in rows if own in wider and found}
        if (wider, more) == (ids, fingerprints):
            return Family(frozenset(ids), frozenset(fingerprints))
        ids, fingerprints = wider, more
