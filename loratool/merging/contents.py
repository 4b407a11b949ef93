"""Which adapters are in the weights of a model: through chains of merges, changes of storage, and what was taken out again."""

from __future__ import annotations

from pathlib import Path

from loratool.errors import LoratoolError
from loratool.merging.manifest import KINDS, Manifest, MergedAdapter, read_manifest


def manifest_of(folder: Path) -> Manifest | None:
    """The manifest of whatever kind beside a model's weights; None where there is none that can be read."""
    try:
        return read_manifest(folder, KINDS)
    except LoratoolError:
        return None


def contents_of(manifest: Manifest) -> tuple[MergedAdapter, ...]:
    """The adapters in the model of a manifest, as far as it says, the first merged first."""
    return (*manifest.earlier, *manifest.adapters)


def contents_of_base(folder: Path, fingerprint: str) -> tuple[MergedAdapter, ...]:
    """The adapters in the base whose weights lie in `folder` and have this fingerprint.

    A manifest of other weights, which another program copied along and then changed, is not believed.
    """
    manifest = manifest_of(folder)
    return contents_of(manifest) if manifest is not None and manifest.fingerprint == fingerprint else ()
