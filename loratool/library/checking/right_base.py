"""Check that a base is the right one: unchanged since it was catalogued, and the one that its adapters belong to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from loratool.checkpoint.fingerprint import fingerprint, tensor_digests
from loratool.checkpoint.model import Checkpoint
from loratool.errors import LoratoolError, WrongBaseError, quoted
from loratool.library.checking.stated_base import other_base_notes
from loratool.library.places.home_folder import digest_cache
from loratool.library.reporting.progress import Progress
from loratool.library.resolving.resolve import ResolvedAdapter, ResolvedBase
from loratool.merging.manifest import read_manifest
from registry import Registry

ANY_BASE: Final = "--any-base"


def check_base(base: ResolvedBase, adapters: Sequence[ResolvedAdapter], checkpoint: Checkpoint, catalogue: Registry,
               watcher: Progress, *, any_base: bool) -> tuple[dict[str, str] | None, list[str]]:  # fmt: skip
    """Check the base of a merge by its fingerprint, if the catalogue or an adapter records one.

    Return the digests of its tensors (None if no fingerprint is recorded), and notes on how each adapter was matched to it.

    Raises:
        WrongBaseError: an adapter records another base, or the base has changed since it was catalogued. With `any_base`
            these are notes.
    """
    if base.headers is not None:
        notes = [f"base {quoted(base.name)} is not downloaded: its content is checked after the download"]
        return None, [*notes, *(note for found in adapters for note in _named_differently(found, base))]
    recorded = base.record.fingerprint if base.record else None
    if recorded is None and not any(found.base_fingerprint for found in adapters):
        return None, [note for found in adapters for note in (_unrecorded(found), *_named_differently(found, base))]
    watcher.begin("fingerprinting the base", checkpoint.nbytes)
    digests = tensor_digests(checkpoint, digest_cache(), progress=watcher.advance)
    actual = fingerprint(checkpoint.tensors, digests)
    notes = refuse_changed(base, actual, any_base=any_base)
    for found in adapters:
        if found.base_fingerprint is None:
            notes += [_unrecorded(found), *_named_differently(found, base)]
        elif not _belongs(found.base_fingerprint, checkpoint, actual, catalogue):
            notes += _passed(_belongs_elsewhere(found, base, actual, catalogue), "merge it into its own base", any_base)
    return digests, notes


def refuse_changed(base: ResolvedBase, actual: str, *, any_base: bool) -> list[str]:
    """Check that a base has not changed since it was catalogued; return notes.

    Raises:
        WrongBaseError: it has changed, and `any_base` is off.
    """
    if base.record is None or base.record.fingerprint in (None, actual):
        return []
    problem = f"the files of base {quoted(base.name)} are not those that were catalogued"
    return _passed(problem, f"see 'loratool base verify {base.name}'", any_base)


def base_label(wanted: str, catalogue: Registry) -> str:
    """Return the first digits of a base's fingerprint, after its name if it is catalogued."""
    known = catalogue.bases.find_by_fingerprint(wanted)
    return f"{quoted(known[0].name)} ({wanted[:12]}…)" if known else f"{wanted[:12]}…"


def _passed(problem: str, advice: str, any_base: bool) -> list[str]:
    """Return a note on a problem that `any_base` overrides; raise WrongBaseError without `any_base`."""
    if not any_base:
        raise WrongBaseError(f"{problem}; {advice}, or give {ANY_BASE}")
    return [f"{problem}; done all the same, with {ANY_BASE}"]


def _belongs(wanted: str, checkpoint: Checkpoint, actual: str, catalogue: Registry) -> bool:
    originals = _originals(checkpoint, actual)
    return any(catalogue.bases.same_family(wanted, one) for one in originals)


def _originals(checkpoint: Checkpoint, actual: str) -> Iterator[str]:
    """Yield the fingerprint of a model, and if loratool quantized it also that of its dense base."""
    yield actual
    try:
        manifest = read_manifest(checkpoint.path, ("quantization",))
    except LoratoolError:
        return
    if manifest.fingerprint == actual:
        yield manifest.base_fingerprint


def _belongs_elsewhere(found: ResolvedAdapter, base: ResolvedBase, actual: str, catalogue: Registry) -> str:
    return (
        f"{quoted(found.adapter.name)} belongs to the base {base_label(str(found.base_fingerprint), catalogue)}, "
        f"and {quoted(base.name)} is another model ({actual[:12]}…)"
    )


def _named_differently(found: ResolvedAdapter, base: ResolvedBase) -> list[str]:
    """Return a note if the adapter records no fingerprint and names another base."""
    if found.base_fingerprint is not None:
        return []
    return other_base_notes(found.adapter, base.name, base.path, base.record)


def _unrecorded(found: ResolvedAdapter) -> str:
    return f"{quoted(found.adapter.name)} records no base fingerprint: it was matched by names and shapes"
