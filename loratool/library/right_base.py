"""Whether a base is the right one: what was catalogued under its name, and what its adapters belong to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from loratool.checkpoint.fingerprint import fingerprint, tensor_digests
from loratool.checkpoint.model import Checkpoint
from loratool.errors import LoratoolError, WrongBaseError, quoted
from loratool.library.home_folder import digest_cache
from loratool.library.progress import Progress
from loratool.library.resolve import ResolvedAdapter, ResolvedBase
from loratool.library.stated_base import other_base_notes
from loratool.merging.manifest import read_manifest
from registry import Registry

ANY_BASE: Final = "--any-base"


def check_base(base: ResolvedBase, adapters: Sequence[ResolvedAdapter], checkpoint: Checkpoint, catalogue: Registry,
               watcher: Progress, *, any_base: bool) -> tuple[dict[str, str] | None, list[str]]:  # fmt: skip
    """Check a base that adapters are merged into, by its fingerprint where one is recorded.

    Returns the digests of its tensors, where its fingerprint matters, and notes on how each adapter was matched to it.

    Raises:
        WrongBaseError: an adapter records another base, or the base is not what was catalogued under its name; with
            `any_base` it is a note instead.
    """
    if base.headers is not None:
        notes = [f"base {quoted(base.name)} is not downloaded: its content is checked when it is"]
        return None, [*notes, *(note for found in adapters for note in _named_otherwise(found, base))]
    recorded = base.record.fingerprint if base.record else None
    if recorded is None and not any(found.base_fingerprint for found in adapters):
        return None, [note for found in adapters for note in (_unrecorded(found), *_named_otherwise(found, base))]
    watcher.begin("fingerprinting the base", checkpoint.nbytes)
    digests = tensor_digests(checkpoint, digest_cache(), progress=watcher.advance)
    actual = fingerprint(checkpoint.tensors, digests)
    notes = refuse_changed(base, actual, any_base=any_base)
    for found in adapters:
        if found.base_fingerprint is None:
            notes += [_unrecorded(found), *_named_otherwise(found, base)]
        elif not _belongs(found.base_fingerprint, checkpoint, actual, catalogue):
            notes += _passed(_belongs_elsewhere(found, base, actual, catalogue), "merge it into its own base", any_base)
    return digests, notes


def refuse_changed(base: ResolvedBase, actual: str, *, any_base: bool) -> list[str]:
    """Check that a catalogued base still has the content that was catalogued; notes.

    Raises:
        WrongBaseError: it has not, and `any_base` is off.
    """
    if base.record is None or base.record.fingerprint in (None, actual):
        return []
    problem = f"the files of base {quoted(base.name)} are not those that were catalogued"
    return _passed(problem, f"see 'loratool base verify {base.name}'", any_base)


def base_label(wanted: str, catalogue: Registry) -> str:
    """The name of a base that the catalogue knows by its fingerprint, with the beginning of that."""
    known = catalogue.bases.find_by_fingerprint(wanted)
    return f"{quoted(known[0].name)} ({wanted[:12]}…)" if known else f"{wanted[:12]}…"


def _passed(problem: str, advice: str, any_base: bool) -> list[str]:
    """A note on a problem that `any_base` goes past; WrongBaseError without it."""
    if not any_base:
        raise WrongBaseError(f"{problem}; {advice}, or give {ANY_BASE}")
    return [f"{problem}; done all the same, with {ANY_BASE}"]


def _belongs(wanted: str, checkpoint: Checkpoint, actual: str, catalogue: Registry) -> bool:
    originals = _originals(checkpoint, actual)
    return any(catalogue.bases.same_family(wanted, one) for one in originals)


def _originals(checkpoint: Checkpoint, actual: str) -> Iterator[str]:
    """The fingerprint of a model, and that of the dense model that loratool made it of where it is a quantized image."""
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


def _named_otherwise(found: ResolvedAdapter, base: ResolvedBase) -> list[str]:
    """A note where no fingerprint decides and the adapter names another base than this."""
    if found.base_fingerprint is not None:
        return []
    return other_base_notes(found.adapter, base.name, base.path, base.record)


def _unrecorded(found: ResolvedAdapter) -> str:
    return f"{quoted(found.adapter.name)} records no base fingerprint: it was matched by names and shapes"
