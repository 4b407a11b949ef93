"""Recognition of a merge in place that was completed but not recorded in the catalogue, since its run was killed."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.checkpoint.fingerprint import fingerprint, tensor_digests
from loratool.checkpoint.model import Checkpoint
from loratool.library.places.home_folder import digest_cache
from loratool.library.reporting.progress import Progress
from loratool.merging.contents import manifest_of
from loratool.merging.manifest import Manifest, MergedAdapter
from loratool.merging.plan import WeightedAdapter
from registry import Registry


def finished_before(checkpoint: Checkpoint, adapters: Sequence[WeightedAdapter], catalogue: Registry,
                    watcher: Progress) -> Manifest | None:  # fmt: skip
    """Return the manifest of this merge, if it was the last one in place and the catalogue has no record of it.

    A run that is killed after its commit leaves this state: the next command carries the change out, and only the record is
    missing. Merging again would add the update twice.
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
    """Return whether a manifest lists these adapters, in this order, with the same weights, ranks, alphas and scalings."""
    if len(merged) != len(adapters):
        return False
    return all(
        (entry.sha256, entry.weight, entry.rank, entry.alpha, entry.scaling)
        == (each.adapter.sha256, each.weight, each.adapter.rank, each.adapter.alpha, each.adapter.scaling)
        for entry, each in zip(merged, adapters, strict=True)
    )
