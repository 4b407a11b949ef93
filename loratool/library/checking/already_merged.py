"""Check that an adapter is not in a base's weights already: itself, one it was made from, or one made from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

from loratool.checkpoint.fingerprint import fingerprint, tensor_digests
from loratool.checkpoint.model import Checkpoint
from loratool.errors import AlreadyMergedError, quoted, to_paste
from loratool.formats.content import content_of
from loratool.formats.facts import parents_of
from loratool.library.places.home_folder import digest_cache
from loratool.library.reporting.progress import Progress
from loratool.library.resolving.resolve import ResolvedAdapter
from loratool.merging.contents import contents_of, manifest_of
from loratool.merging.manifest import HeldAdapter, Manifest
from registry import Registry

AGAIN: Final = "--again"


@dataclass(frozen=True, slots=True)
class _Kin:
    """Identity of an adapter: its own digests, and the sha256 of all adapters it was made from."""

    name: str
    own: frozenset[str]
    made_of: frozenset[str]

    def relation(self, other: _Kin) -> str | None:
        """Describe how `other` holds this adapter's update, as the subject of a sentence; None if they are unrelated."""
        if self.own & other.own:
            return quoted(self.name)
        if self.made_of & other.own:
            return f"{quoted(self.name)} is made of {quoted(other.name)}, which"
        if self.own & other.made_of:
            return f"{quoted(other.name)}, which is made of {quoted(self.name)},"
        if self.made_of & other.made_of:
            return f"{quoted(other.name)}, which is made of the same adapter as {quoted(self.name)},"
        return None


def refuse_again(adapters: Sequence[ResolvedAdapter], checkpoint: Checkpoint, catalogue: Registry, watcher: Progress, *,
                 again: bool) -> list[str]:  # fmt: skip
    """Check that no adapter is merged twice: by the same command, or into weights that hold it already. Return notes.

    The base's manifest lists what it holds. It counts only if the base still has the content that the manifest describes.

    Raises:
        AlreadyMergedError: an adapter is merged twice, and `again` is off.
    """
    manifest = manifest_of(checkpoint.folder)
    if again or (manifest is None and len(adapters) == 1):
        return []
    kin = [_kin_of(found, catalogue) for found in adapters]
    for (here, one), (there, other) in combinations(zip(adapters, kin, strict=True), 2):
        shared = one.relation(other)
        if shared is not None and not _by_rank(here, there):
            raise AlreadyMergedError(
                f"{shared} is merged by the same command, so that its update would be added twice; name one of them, or "
                f"give {AGAIN}"
            )
    found = None if manifest is None else _first_in(kin, manifest, catalogue)
    if manifest is None or found is None:
        return []
    shared, weight = found
    watcher.begin("fingerprinting the base", checkpoint.nbytes)
    digests = tensor_digests(checkpoint, digest_cache(), progress=watcher.advance)
    if fingerprint(checkpoint.tensors, digests) != manifest.fingerprint:
        return [
            f"{quoted(checkpoint.folder)} has changed since its loratool.json was written, so the statement there that {shared} "
            "is in it was ignored"
        ]
    way = to_paste(f"loratool unmerge PATH{' --in-place' if manifest.in_place else ''}", checkpoint.folder)
    raise AlreadyMergedError(
        f"{shared} is in {quoted(checkpoint.folder)} already, with weight {weight:g}; take it out with {way}, "
        f"or give {AGAIN} to add its update once more"
    )


def _by_rank(one: ResolvedAdapter, other: ResolvedAdapter) -> bool:
    """Return whether two adapters of one command are different ranks of a DyLoRA, both chosen by the user."""
    return None not in (one.rank, other.rank) and one.rank != other.rank


def _first_in(kin: Sequence[_Kin], manifest: Manifest, catalogue: Registry) -> tuple[str, float] | None:
    """Return the first relation of one of `kin` to an adapter in the manifest, and that adapter's weight."""
    for entry in contents_of(manifest):
        held = _kin_of_entry(entry, catalogue)
        for one in kin:
            shared = one.relation(held)
            if shared is not None:
                return shared, entry.weight
    return None


def _kin_of(found: ResolvedAdapter, catalogue: Registry) -> _Kin:
    adapter = found.adapter
    own = frozenset({adapter.sha256, content_of(adapter)})
    parents = {*parents_of(adapter.facts), *_ancestors(adapter.sha256, catalogue)}
    return _Kin(adapter.name, own, _with_ancestors(parents, catalogue) - own)


def _kin_of_entry(entry: HeldAdapter, catalogue: Registry) -> _Kin:
    own = frozenset({entry.sha256, entry.content} - {""})
    parents = {*entry.parents, *_ancestors(entry.sha256, catalogue)}
    return _Kin(entry.name, own, _with_ancestors(parents, catalogue) - own)


def _with_ancestors(parents: set[str], catalogue: Registry) -> frozenset[str]:
    return frozenset(parents).union(*(_ancestors(parent, catalogue) for parent in parents))


def _ancestors(sha256: str, catalogue: Registry) -> Iterator[str]:
    """Yield the sha256 of all catalogued ancestors of adapters with these weights."""
    for record in catalogue.adapters.find_by_sha256(sha256):
        for edge in catalogue.lineage.ancestors(record):
            if edge.parent_sha256 is not None:
                yield edge.parent_sha256
