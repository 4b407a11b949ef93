"""Search for the base and the adapters of a merge that a manifest records."""

from __future__ import annotations

from itertools import product
from pathlib import Path

from loratool.checkpoint.fingerprint import fingerprint, tensor_digests
from loratool.checkpoint.model import Checkpoint
from loratool.errors import LoratoolError, NotFoundError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.alpha import RANK, Alpha
from loratool.formats.read import read_adapter
from loratool.library.places.holding import hold
from loratool.library.places.home_folder import digest_cache
from loratool.library.places.user_path import exists
from loratool.library.reporting.progress import Progress
from loratool.library.resolving.hub_bases import is_away, obtain
from loratool.library.resolving.resolve import is_here
from loratool.merging.manifest import Manifest, MergedAdapter
from loratool.merging.undo import adapter_file
from registry import Registry


def find_base(merged: Checkpoint, manifest: Manifest, catalogue: Registry, watcher: Progress) -> Checkpoint | None:
    """Find the base by its fingerprint, at its catalogued path or else at the path that the manifest records.

    The folder is locked while it is read, which first finishes an interrupted change in place.
    """
    known = [record.path for record in catalogue.bases.find_by_fingerprint(manifest.base_fingerprint)]
    for path in [*known, Path(manifest.base_path)]:
        if path is None or not exists(path) or merged.folder.resolve() in (path.resolve(), path.resolve().parent):
            continue
        try:
            with hold(path, exclusive=False):
                checkpoint = Checkpoint.open(path)
                watcher.begin("fingerprinting the base", checkpoint.nbytes)
                digests = tensor_digests(checkpoint, digest_cache(), progress=watcher.advance)
        except LoratoolError:
            continue
        if fingerprint(checkpoint.tensors, digests) == manifest.base_fingerprint:
            return checkpoint
    return None


def download_base_again(manifest: Manifest, catalogue: Registry, watcher: Progress) -> bool:
    """Download the base again if it is catalogued from the Hub; return whether it was downloaded."""
    for record in catalogue.bases.find_by_fingerprint(manifest.base_fingerprint):
        if is_away(record):
            obtain(record, catalogue, watcher)
            return True
    return False


def find_adapters(folder: Path, manifest: Manifest, catalogue: Registry) -> list[Adapter]:
    return [_find_adapter(index, entry, folder, manifest, catalogue) for index, entry in enumerate(manifest.adapters)]


def _find_adapter(index: int, entry: MergedAdapter, folder: Path, manifest: Manifest, catalogue: Registry) -> Adapter:
    """Find an adapter of the merge by its sha256: beside the undo file, in the catalogue or its trash, or at its old path."""
    if manifest.undo is not None:
        kept = _readable(folder / manifest.undo / adapter_file(index))
        if kept is not None and kept.sha256 in (manifest.undo_adapters[index : index + 1] or (kept.sha256,)):
            return kept
    known = catalogue.adapters.find_by_sha256(entry.sha256)
    places = [catalogue.adapters.files(record) for record in known if is_here(record, catalogue)]
    trashed = [catalogue.trash.files(each) for each in catalogue.trash.list(sha256=entry.sha256)]
    alphas: tuple[Alpha | None, ...] = (None, entry.alpha, RANK)
    for place, alpha in product([*places, *filter(None, trashed), Path(entry.file)], alphas):
        adapter = _readable(place, alpha)
        if adapter is not None and entry.is_it(adapter):
            return adapter
    raise NotFoundError(
        f"the adapter {quoted(entry.name)} (sha256 {entry.sha256[:12]}…) is neither in the catalogue nor at "
        f"{quoted(entry.file)}; catalogue it with 'loratool add'"
    )


def _readable(place: Path, alpha: Alpha | None = None) -> Adapter | None:
    """Return the adapter at `place`, read with the given alpha; None if it cannot be read."""
    try:
        return read_adapter(place, alpha) if exists(place) else None
    except LoratoolError:
        return None
