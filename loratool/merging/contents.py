"""Which adapters are in the weights of a model: through chains of merges, changes of storage, and what was taken out again."""

from __future__ import annotations

from pathlib import Path

from loratool.errors import LoratoolError
from loratool.merging.manifest import KINDS, MANIFEST_NAME, HeldAdapter, Manifest, parse_manifest, read_manifest


def manifest_of(folder: Path) -> Manifest | None:
    """The manifest of whatever kind beside a model's weights; None where there is none that can be read."""
    try:
        return read_manifest(folder, KINDS)
    except LoratoolError:
        return None


def contents_of(manifest: Manifest) -> tuple[HeldAdapter, ...]:
    """The adapters in the model of a manifest, as far as it and those that it keeps of its bases say, the first merged first."""
    found: list[HeldAdapter] = []
    now: Manifest | None = manifest
    while now is not None:
        found = [*now.earlier, *(adapter.held for adapter in now.adapters), *found]
        before = None if now.earlier else _previous(now)
        now = before if before is not None and before.fingerprint == now.base_fingerprint else None
    return tuple(found)


def _previous(manifest: Manifest) -> Manifest | None:
    """The manifest that the base had; None where that had none that can be read."""
    if manifest.previous is None:
        return None
    try:
        return parse_manifest(manifest.previous, Path(MANIFEST_NAME), KINDS)
    except LoratoolError:
        return None


def contents_of_base(folder: Path, fingerprint: str) -> tuple[HeldAdapter, ...]:
    """The adapters in the base whose weights lie in `folder` and have this fingerprint.

    A manifest of other weights, which another program copied along and then changed, is not believed.
    """
    manifest = manifest_of(folder)
    return contents_of(manifest) if manifest is not None and manifest.fingerprint == fingerprint else ()
