"""New entries of adapters: their facts, their base, their files in the content store, and their lineage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratool.checkpoint.dtypes import title as dtype_title
from loratool.formats.adapter import Adapter
from loratool.formats.adapter_files import size_of_file
from loratool.formats.facts import lineage_of
from loratool.formats.identity import AnyAdapter
from loratool.formats.table import OWN
from loratool.interrupts import Deferral
from loratool.library.recording.base_of_adapter import find_base_of
from loratool.library.recording.entry_files import entry_files, entry_notes
from loratool.library.recording.next_version import same_weights_notes
from registry import AdapterFacts, AdapterRecord, BaseRecord, Location, Registry, RegistryError

if TYPE_CHECKING:
    from registry.store import Staged


@dataclass(frozen=True, slots=True)
class AddResult:
    """An adapter's entry in the catalogue, whether it is `new`, and notes on how it was read and tied to its base."""

    record: AdapterRecord
    new: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HubPlace:
    """The place of an adapter on the Hub, and its base's name from its configuration or else its card."""

    location: Location
    base_model: str | None


def enter(adapter: AnyAdapter, catalogue: Registry, *, name: str, base: str | None = None, any_base: bool = False,
          tags: Sequence[str] = (), place: HubPlace | None = None) -> AddResult:  # fmt: skip
    """Catalogue an adapter, and copy its files into the content store.

    With a `place` on the Hub, the lineage in its facts is recorded, too; the facts must have been checked.

    Raises:
        LoratoolError, registry.RegistryError: it does not fit `base`, or the name cannot be used.
    """
    named = None if place is None else place.base_model
    with staged_entry(adapter, catalogue, base=base, any_base=any_base, base_model=named) as entry:
        with at_once(catalogue):
            added = entry.add(name, tags, () if place is None else [place.location])
            if place is not None:
                _record_lineage(added.record, adapter, catalogue)
        return added


@contextmanager
def at_once(catalogue: Registry) -> Iterator[None]:
    """Block of one transaction that Ctrl-C does not interrupt, so that files renamed in it always have their rows."""
    with ExitStack() as after_commit, catalogue.writing():
        after_commit.enter_context(Deferral())
        yield


@contextmanager
def staged_entry(adapter: AnyAdapter, catalogue: Registry, *, base: str | None = None, any_base: bool = False,
                 base_model: str | None = None) -> Iterator[StagedEntry]:  # fmt: skip
    """Copy the files of an adapter into the store's staging area. They are removed at the end unless the entry is added.

    `base_model` is its base's name, by default the one in its configuration.

    Raises:
        LoratoolError, registry.RegistryError: it does not fit `base`, or the store cannot be written.
    """
    facts, owner, notes = facts_of(adapter, catalogue, base=base, any_base=any_base, base_model=base_model)
    files, weights = entry_files(adapter)
    with catalogue.store.stage(files, {weights: adapter.sha256}) as staged:
        yield StagedEntry(catalogue, facts, owner, staged, entry_notes(adapter), tuple(notes))


def facts_of(adapter: AnyAdapter, catalogue: Registry, *, base: str | None = None, any_base: bool = False,
             base_model: str | None = None) -> tuple[AdapterFacts, BaseRecord | None, list[str]]:  # fmt: skip
    """Return the catalogue's facts about an adapter, its catalogued base, and notes on how that was found.

    Raises:
        LoratoolError, registry.RegistryError: it does not fit `base`.
    """
    base_model = base_model or adapter.base_model
    owner, notes = find_base_of(adapter, base, base_model, catalogue, any_base=any_base)
    return replace(facts_from(adapter, owner), base_model=base_model), owner, notes


@dataclass(frozen=True, slots=True)
class StagedEntry:
    """An adapter whose files are in the store's staging area, so that `add` only inserts rows."""

    catalogue: Registry
    facts: AdapterFacts
    owner: BaseRecord | None
    staged: Staged
    notes: tuple[str, ...]
    base_notes: tuple[str, ...]

    def add(self, name: str, tags: Sequence[str] = (), locations: Sequence[Location] = ()) -> AddResult:
        """Add it to the catalogue under `name`, with further `locations`.

        Raises:
            registry.RegistryError: the name cannot be used, or the catalogue cannot be written.
        """
        owner = self.owner.name if self.owner else None
        record, new = self.catalogue.adapters.add(
            name, self.facts, base=owner, tags=tags, locations=locations, staged=self.staged
        )
        # An adapter that is tied to a base stays so, whatever this file and this call say.
        tied_before = self.owner is None and record.base is not None
        notes = (*self.notes, *same_weights_notes(record, self.catalogue))
        return AddResult(record, new, notes if tied_before else (*notes, *self.base_notes))


def facts_from(adapter: AnyAdapter, owner: BaseRecord | None) -> AdapterFacts:
    """Return the catalogue's facts about an adapter. `owner` is its base, or None if that is not catalogued."""
    if isinstance(adapter, Adapter):
        form, count, family = adapter.layout.format if adapter.layout else OWN.name, len(adapter.tensors), None
    else:
        form, count, family = adapter.format, adapter.tensor_count, adapter.family
    return AdapterFacts(
        kind=adapter.kind,
        sha256=adapter.sha256,
        size_bytes=size_of_file(adapter.file),
        rank=adapter.rank,
        ranks=adapter.ranks,
        alpha=adapter.alpha,
        scaling=adapter.scaling,
        target_modules=list(adapter.target_modules),
        dtype=dtype_title(adapter.dtype),
        parameter_count=adapter.parameter_count,
        base_fingerprint=owner.fingerprint if owner else adapter.base_fingerprint,
        base_model=adapter.base_model,
        recipe=adapter.facts.get("recipe"),
        metrics=adapter.facts.get("metrics"),
        config=dict(adapter.config),
        format=form,
        tensor_count=count,
        family=family,
    )


def _record_lineage(record: AdapterRecord, adapter: AnyAdapter, catalogue: Registry) -> None:
    """Record the lineage in an adapter's facts. A catalogued parent is found by its sha256."""
    found = lineage_of(adapter.facts)
    if found is None:
        return
    operation, parents, details = found
    for parent in parents:
        known = catalogue.adapters.find_by_sha256(parent.sha256) if parent.sha256 else ()
        if any(each.sha256 == record.sha256 for each in known):
            continue
        # A file from outside may name its own descendants as parents.
        with suppress(RegistryError):
            catalogue.lineage.record(
                record, known[0] if known else parent.name, operation, parent_sha256=parent.sha256, details=details
            )
