"""What a command is to tell the catalogue once its output is there, so that the catalogue comes to know it even after a kill.

An output gets its name, or a change in place is committed, a moment before the catalogue knows of it. A command that is killed
or interrupted in that moment has noted before what it was about (`loratool.checkpoint.unfinished`); the next command that
opens the catalogue looks at what is there and makes the entry.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, Self

from loratool.checkpoint.unfinished import Note, taken_over
from loratool.errors import LoratoolError
from loratool.interrupts import whole
from registry import MergedAdapter, Registry, RegistryError

MANIFEST_NAME: Final = "loratool.json"


@dataclass(frozen=True, slots=True)
class Promise(ABC):
    """What is to be entered once the model at `out` is another than now; `before` tells what it is now."""

    what: ClassVar[str]
    out: str
    before: str | None

    @abstractmethod
    def enter(self, catalogue: Registry) -> None:
        """Enter it, if that was not done.

        Raises:
            LoratoolError, RegistryError: what is at `out` cannot be read, or the catalogue cannot be written.
        """

    def keep(self, catalogue: Registry) -> None:
        """Enter it if the output is there."""
        if _state_of(Path(self.out)) != self.before:
            self.enter(catalogue)


@dataclass(frozen=True, slots=True)
class PromisedMerge(Promise):
    """A merge: its adapters' references, sha256 and weights, in their order."""

    what = "merge"
    adapters: tuple[tuple[str, str, float], ...]
    in_place: bool

    @classmethod
    def of(cls, out: Path, adapters: tuple[MergedAdapter, ...], *, in_place: bool) -> PromisedMerge:
        """The promise of a merge that begins now."""
        merged = tuple((each.adapter, each.sha256, each.weight) for each in adapters)
        return cls(os.path.abspath(out), _state_of(out), merged, in_place)

    def enter(self, catalogue: Registry) -> None:
        from loratool.merging.manifest import read_manifest
        from loratool.merging.undo import UNDO_NAME

        out = Path(self.out)
        manifest = read_manifest(out)
        merged = [(each.sha256, each.weight) for each in manifest.adapters]
        if manifest.in_place != self.in_place or merged != [(digest, weight) for _, digest, weight in self.adapters]:
            return  # somebody else's
        known = catalogue.merges.of_output(out)
        if known and (known[0].state, known[0].output_fingerprint) == ("merged", manifest.fingerprint):
            return
        survival = manifest.survival_of_all
        catalogue.merges.record(
            out,
            base_fingerprint=manifest.base_fingerprint,
            merged=[MergedAdapter(adapter=name, sha256=digest, weight=weight) for name, digest, weight in self.adapters],
            output_fingerprint=manifest.fingerprint,
            undo_file=None if manifest.undo is None else out / manifest.undo / UNDO_NAME,
            in_place=self.in_place,
            options={} if survival is None else {"survival": survival.to_json()},
        )


@dataclass(frozen=True, slots=True)
class PromisedUnmerge(Promise):
    """A merge taken out in place: the fingerprint of the merged model."""

    what = "unmerge"
    fingerprint: str

    @classmethod
    def of(cls, out: Path, fingerprint: str) -> PromisedUnmerge:
        """The promise of an unmerge that begins now."""
        return cls(os.path.abspath(out), _state_of(out), fingerprint)

    def enter(self, catalogue: Registry) -> None:
        for record in catalogue.merges.of_output(Path(self.out)):
            if record.output_fingerprint == self.fingerprint and record.state in ("merged", "gone"):
                catalogue.merges.set_state(record.id, "unmerged")


@dataclass(frozen=True, slots=True)
class PromisedVariant(Promise):
    """A quantized model, to be catalogued under `name` as a variant of the base `variant_of`, where that is still `original`.

    Without a fingerprint `original` of a catalogued base there is no variant, only a model of its own.
    """

    what = "quantize"
    name: str
    variant_of: str
    original: str | None

    @classmethod
    def of(cls, out: Path, name: str, variant_of: str, original: str | None) -> PromisedVariant:
        """The promise of a quantization that begins now."""
        return cls(os.path.abspath(out), _state_of(out), name, variant_of, original)

    def enter(self, catalogue: Registry) -> None:
        from loratool.checkpoint.model import Checkpoint
        from loratool.library.bases import add_variant
        from loratool.merging.manifest import read_manifest

        out = Path(self.out)
        manifest = read_manifest(out, ("quantization",))
        add_variant(
            catalogue,
            self.name,
            out,
            Checkpoint.open(Path(manifest.base_path)),
            fingerprint=manifest.fingerprint,
            variant_of=self.variant_of if self.original == manifest.base_fingerprint else None,
            size_bytes=Checkpoint.open(out).nbytes,
            dtype="nf4",
        )


KINDS: Final[Mapping[str, type[Promise]]] = {
    kind.what: kind for kind in (PromisedMerge, PromisedUnmerge, PromisedVariant)
}


class Promised:
    """Inside, the promise is noted. Where the block ends with an error after the output has appeared, it is kept at once."""

    def __init__(self, promise: Promise | None, catalogue: Registry) -> None:
        self._promise, self._catalogue = promise, catalogue
        facts = {} if promise is None else {"what": promise.what, "catalogue": catalogue.database.where, **asdict(promise)}
        self._note = None if promise is None else Note(facts)

    def __enter__(self) -> Self:
        if self._note is not None:
            self._note.__enter__()
        return self

    @whole
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._note is None or self._promise is None:
            return
        if error is not None:
            try:
                self._promise.keep(self._catalogue)
            except (LoratoolError, RegistryError, OSError):
                return  # the note stays for the next command
        self._note.__exit__(kind, error, trace)


def settle(catalogue: Registry, folder: Path) -> None:
    """Keep the promises noted in `folder` of runs that are dead, and forget what they noted of outputs of which nothing is left."""
    from loratool.library.leftovers import is_left

    with taken_over(folder) as notes:
        for note in notes:
            with suppress(LoratoolError, RegistryError, OSError, ValueError, TypeError, KeyError):
                kind = KINDS.get(note.facts["what"])
                if kind is None:
                    if not is_left(note):
                        note.forget()
                elif note.facts["catalogue"] == catalogue.database.where:
                    with catalogue.for_writing() as writable:
                        _parsed(kind, note.facts).keep(writable)
                    note.forget()


def _parsed(kind: type[Promise], facts: Mapping[str, Any]) -> Promise:
    """The promise in a note; KeyError or TypeError where it is none."""
    values = {name: facts[name] for name in kind.__dataclass_fields__}
    if "adapters" in values:
        values["adapters"] = tuple((str(name), str(digest), float(weight)) for name, digest, weight in values["adapters"])
    return kind(**values)


def _state_of(out: Path) -> str | None:
    """What tells whether another model has come to be at `out`: the digest of its manifest; None where it has none."""
    try:
        return sha256((out / MANIFEST_NAME).read_bytes()).hexdigest()
    except OSError:
        return None
