"""Which adapters a model's weights contain, across chains of merges, unmerges and changes of storage."""

from __future__ import annotations

from pathlib import Path

from loratool.errors import LoratoolError
from loratool.merging.manifest import KINDS, MANIFEST_NAME, HeldAdapter, Manifest, parse_manifest, read_manifest


def manifest_of(folder: Path) -> Manifest | None:
    """Return the manifest, of any kind, beside a model's weights; None if it is missing or unreadable."""
    try:
        return read_manifest(folder, KINDS)
    except LoratoolError:
        return None


def contents_of(manifest: Manifest) -> tuple[HeldAdapter, ...]:
    """Return the adapters that a manifest and its kept base manifests record as merged, in merge order."""
    found: list[HeldAdapter] = []
    now: Manifest | None = manifest
    while now is not None:
        found = [*now.earlier, *(adapter.held for adapter in now.adapters), *found]
        before = None if now.earlier else _previous(now)
        now = before if before is not None and before.fingerprint == now.base_fingerprint else None
    return tuple(found)


def _previous(manifest: Manifest) -> Manifest | None:
    """Return the base's own manifest; None if it had none or it is unreadable."""
    if manifest.previous is None:
        return None
    try:
        return parse_manifest(manifest.previous, Path(MANIFEST_NAME), KINDS)
    except LoratoolError:
        return None


def contents_of_base(folder: Path, fingerprint: str) -> tuple[HeldAdapter, ...]:
    """Return the adapters in the base whose weights are in `folder` and have this fingerprint.

    Return none if the manifest's fingerprint differs: another program may have copied the manifest and changed the weights.
    """
    manifest = manifest_of(folder)
    return contents_of(manifest) if manifest is not None and manifest.fingerprint == fingerprint else ()
