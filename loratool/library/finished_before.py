"""A merge in place that an interrupted run has finished, or that was finished for it, and that nobody recorded."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.checkpoint.fingerprint import fingerprint, tensor_digests
from loratool.checkpoint.model import Checkpoint
from loratool.library.home_folder import digest_cache
from loratool.library.progress import Progress
from loratool.merging.contents import manifest_of
from loratool.merging.manifest import Manifest, MergedAdapter
from loratool.merging.plan import WeightedAdapter
from registry import Registry


def finished_before(checkpoint: Checkpoint, adapters: Sequence[WeightedAdapter], catalogue: Registry,
                    watcher: Progress) -> Manifest | None:  # fmt: skip
    """The manifest of this very merge, if it was the last that was made in place and the catalogue does not know of it.

    A run that was killed after its commit leaves that: its change is carried out by whoever opens the folder next, and only
    the record is missing. Merging once more would add the update twice.
    """
    manifest = manifest_of(checkpoint.folder)
    if manifest is None or not manifest.in_place or manifest.kind != "merge" or not _is_it(manifest.adapters, adapters):
        return None
    recorded = catalogue.merges.of_output(checkpoint.path.absolute())
    if any(each.output_fingerprint == manifest.fingerprint and each.state in ("merged", "gone") for each in recorded):
        return None
    watcher.begin("looking at what was merged", checkpoint.nbytes)
    digests = tensor_digests(checkpoint, digest_cache(), progress=watcher.advance)
    return manifest if fingerprint(checkpoint.tensors, digests) == manifest.fingerprint else None


def _is_it(merged: Sequence[MergedAdapter], adapters: Sequence[WeightedAdapter]) -> bool:
    """Whether a manifest lists these adapters, in this order, with these weights and at these ranks."""
    if len(merged) != len(adapters):
        return False
    return all(
        (entry.sha256, entry.weight, entry.rank, entry.alpha, entry.scaling)
        == (each.adapter.sha256, each.weight, each.adapter.rank, each.adapter.alpha, each.adapter.scaling)
        for entry, each in zip(merged, adapters, strict=True)
    )
