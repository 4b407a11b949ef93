"""Catalogue entries that a command promises to make for its output, and that are made even if the command is killed.

An output gets its final name, or a change in place is committed, a moment before the catalogue records it. So a command first
writes a note of the entry (`loratool.checkpoint.unfinished`). If it is killed in that moment, the next command that opens the
catalogue examines the output and makes the entry.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, Self

from loratool.checkpoint.header import JOURNAL
from loratool.checkpoint.journal import locked
from loratool.checkpoint.unfinished import Note, taken_over
from loratool.errors import LoratoolError, OutputError
from loratool.interrupts import whole
from registry import (
    MergedAdapter,
    Registry,
    RegistryBusyError,
    RegistryError,
    RegistryUnwritableError,
    is_name,
)

MANIFEST_NAME: Final = "loratool.json"


@dataclass(frozen=True, slots=True)
class Promise(ABC):
    """An entry to make once the model at `out` has changed. `before` is its state now (`_state_of`)."""

    what: ClassVar[str]
    out: str
    before: str | None

    @abstractmethod
    def enter(self, catalogue: Registry) -> None:
        """Make the entry, unless it exists.

        Raises:
            LoratoolError, RegistryError: the model at `out` cannot be read, or the catalogue cannot be written.
        """


@dataclass(frozen=True, slots=True)
class PromisedMerge(Promise):
    """The entry of a merge, with the reference, sha256 and weight of each adapter, in order."""

    what = "merge"
    adapters: tuple[tuple[str, str, float], ...]
    in_place: bool

    @classmethod
    def of(cls, out: Path, adapters: tuple[MergedAdapter, ...], *, in_place: bool) -> PromisedMerge:
        """Return the promise for a merge that begins now."""
        merged = tuple((each.adapter, each.sha256, each.weight) for each in adapters)
        return cls(os.path.abspath(out), _state_of(out), merged, in_place)

    def enter(self, catalogue: Registry) -> None:
        from loratool.merging.manifest import read_manifest
        from loratool.merging.undo import UNDO_NAME

        out = Path(self.out)
        manifest = read_manifest(out)
        merged = [(each.sha256, each.weight) for each in manifest.adapters]
        if manifest.in_place != self.in_place or merged != [(digest, weight) for _, digest, weight in self.adapters]:
            return  # another merge
        known = catalogue.merges.of_output(out)
        if known and (known[0].state, known[0].output_fingerprint) == ("merged", manifest.fingerprint):
            return
        delivery = manifest.delivery_of_all
        catalogue.merges.record(
            out,
            base_fingerprint=manifest.base_fingerprint,
            merged=[
                MergedAdapter(adapter=name, sha256=digest, weight=weight) for name, digest, weight in self.adapters
            ],
            output_fingerprint=manifest.fingerprint,
            undo_file=None if manifest.undo is None else out / manifest.undo / UNDO_NAME,
            in_place=self.in_place,
            options={} if delivery is None else {"delivery": delivery.to_json()},
        )


@dataclass(frozen=True, slots=True)
class PromisedUnmerge(Promise):
    """The record of an unmerge in place. `fingerprint` is that of the merged model."""

    what = "unmerge"
    fingerprint: str

    @classmethod
    def of(cls, out: Path, fingerprint: str) -> PromisedUnmerge:
        """Return the promise for an unmerge that begins now."""
        return cls(os.path.abspath(out), _state_of(out), fingerprint)

    def enter(self, catalogue: Registry) -> None:
        for record in catalogue.merges.of_output(Path(self.out)):
            if record.output_fingerprint == self.fingerprint and record.state in ("merged", "gone"):
                catalogue.merges.set_state(record.id, "unmerged")


@dataclass(frozen=True, slots=True)
class PromisedVariant(Promise):
    """The entry of a quantized model, as a variant of the base `variant_of` if that has not changed.

    Attributes:
        name: its name in the catalogue.
        chosen: whether the user chose the name. A default name is used only for variants.
        original: the catalogue's fingerprint of the base, if it has one.
    """

    what = "quantize"
    name: str
    chosen: bool
    variant_of: str
    original: str | None

    @classmethod
    def of(cls, out: Path, name: str | None, default: str, base: str, original: str | None) -> PromisedVariant:
        """Return the promise for a quantization that begins now, under the user's `name` or else the `default`."""
        return cls(os.path.abspath(out), _state_of(out), name or default, name is not None, base, original)

    def enter(self, catalogue: Registry) -> None:
        from loratool.checkpoint.model import Checkpoint
        from loratool.library.recording.model_entry import add_variant
        from loratool.merging.manifest import read_manifest

        out = Path(self.out)
        manifest = read_manifest(out, ("quantization",))
        is_variant = self.original == manifest.base_fingerprint
        if not is_name(self.name) or not (self.chosen or is_variant):
            return
        add_variant(
            catalogue,
            self.name,
            out,
            Checkpoint.open(Path(manifest.base_path)),
            fingerprint=manifest.fingerprint,
            variant_of=self.variant_of if is_variant else None,
            size_bytes=Checkpoint.open(out).nbytes,
            dtype="nf4",
        )


LATER: Final = (RegistryUnwritableError, RegistryBusyError, OutputError, OSError)
"""Errors that may pass: the catalogue is full, busy or another user's, or another run uses the model."""

KINDS: Final[Mapping[str, type[Promise]]] = {
    kind.what: kind for kind in (PromisedMerge, PromisedUnmerge, PromisedVariant)
}


class Promised:
    """Block in which a promise is noted. The note stays if the block fails after the output has appeared."""

    def __init__(self, promise: Promise, catalogue: Registry) -> None:
        self._promise = promise
        self._note = Note({"what": promise.what, "catalogue": catalogue.database.where, **asdict(promise)})
        self._postponed = False

    def __enter__(self) -> Self:
        self._note.__enter__()
        return self

    @whole
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._postponed or (error is not None and self._is_due()):
            self._note.leave()
        else:
            self._note.__exit__(kind, error, trace)

    def postpone(self, error: RegistryError) -> None:
        """Leave the entry to a later command, if `error` may pass."""
        self._postponed = isinstance(error, LATER)

    def _is_due(self) -> bool:
        out = Path(self._promise.out)
        try:
            begun = (out / JOURNAL).exists()
        except OSError:  # no folder can have this name
            return False
        return begun or _state_of(out) != self._promise.before


def settle(catalogue: Registry, folder: Path) -> None:
    """Keep the promises of dead runs that are noted in `folder`, and remove notes whose outputs are gone."""
    from loratool.library.recording.leftovers import is_left

    with taken_over(folder) as notes:
        for note in notes:
            kind = KINDS.get(note.facts.get("what", ""))
            with suppress(*LATER):
                if kind is None:
                    if not is_left(note.facts):
                        note.forget()
                elif note.facts.get("catalogue") == catalogue.database.where:
                    _settle_one(kind, note.facts, catalogue)
                    note.forget()


def _settle_one(kind: type[Promise], facts: Mapping[str, Any], catalogue: Registry) -> None:
    """Keep the promise of a note, after finishing an interrupted change in place.

    Raises:
        LATER: it cannot be kept now.
    """
    promise = _parsed(kind, facts)
    if promise is None:
        return
    out = Path(promise.out)
    try:
        with locked(out, exclusive=False) if out.is_dir() else nullcontext():
            _keep(promise, catalogue)
    except LATER:
        raise
    except (LoratoolError, RegistryError):
        pass  # there is nothing to enter


def _keep(promise: Promise, catalogue: Registry) -> None:
    """Make the entry if the output has appeared."""
    if _state_of(Path(promise.out)) != promise.before:
        with catalogue.for_writing() as writable:
            promise.enter(writable)


def _parsed(kind: type[Promise], facts: Mapping[str, Any]) -> Promise | None:
    """Return the promise in a note; None if the note is invalid."""
    try:
        values = {each.name: facts[each.name] for each in fields(kind)}
        merged = [(str(name), str(digest), float(weight)) for name, digest, weight in values.get("adapters", ())]
    except (KeyError, TypeError, ValueError):
        return None
    return kind(**values | ({"adapters": tuple(merged)} if "adapters" in values else {}))


def _state_of(out: Path) -> str | None:
    """Return the state of the model at `out`: the sha256 of its manifest, or None if it has none."""
    try:
        return sha256((out / MANIFEST_NAME).read_bytes()).hexdigest()
    except OSError:
        return None
