"""The catalogue of adapters: `loratool.add`, `list`, `show`, `tag` and `export`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.checkpoint.dtypes import title as dtype_title
from loratool.interrupts import Deferral
from loratool.library.adapter_name import name_from
from registry import (
    AdapterFacts,
    AdapterRecord,
    AdapterSummary,
    BaseRecord,
    Location,
    RegistryError,
    SortKey,
    check_name,
    home,
    is_name,
    registry_url,
)
from registry import (
    list_adapters as list_catalogued,
)

if TYPE_CHECKING:
    from loratool.formats.alpha import Alpha
    from loratool.formats.identity import AnyAdapter
    from loratool.library.progress import Progress
    from registry import Registry  # brings SQLAlchemy, which a list does without
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


def add(path: str | os.PathLike[str], *, name: str | None = None, base: str | os.PathLike[str] | None = None,
        any_base: bool = False, alpha: Alpha | None = None, tags: Sequence[str] = (), registry: str | None = None,
        progress: Progress | None = None) -> AddResult:  # fmt: skip
    """Catalogue the adapter at `path`: copy its files into the content store, under their sha256.

    Args:
        path: the folder or file of an adapter of any kind; one that loratool does not compute is kept as it is.
        name: letters, digits, ``.``, ``_`` and ``-``. With a catalogued name, it becomes the next version of that adapter. By
            default the name of the folder or file, or if that is generic (``checkpoint-500``, ``final``) the name of the
            folder above, of the repository in the Hub's cache, or of its base.
        base: the base that it belongs to: a catalogued name, a folder or a Hub id. A base that is not catalogued yet is
            catalogued under its folder's name. By default the base whose fingerprint it records, else the one catalogued from
            the Hub id that it records.
        any_base: tie it to `base` even if it records, or is tied to, another one.
        alpha: alpha of a bare file that does not state it: a number, or ``rank`` for each module's rank.
        tags: words to find it by.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.
        progress: receives the number of bytes of a new base that are fingerprinted.

    Raises:
        LoratoolError, registry.RegistryError: it cannot be read or does not fit `base`; or no name is given, and the default
            one is generic, or belongs to an adapter with another base or other targets.
    """
    from loratool.errors import AdapterError, NotFoundError, quoted
    from loratool.formats.identify import refuse_alpha, refuse_broken_numbers, told_adapter
    from loratool.library.base_of_adapter import name_base_of
    from loratool.library.opening import open_registry
    from loratool.library.user_path import HUB_ID, exists, user_path

    source = user_path(path)
    if not os.fspath(path) or not exists(source):
        is_hub_id = HUB_ID.fullmatch(os.fspath(path)) is not None
        pull = f", or get one from the Hub with 'loratool pull {path}'" if is_hub_id else ""
        raise NotFoundError(f"there is no adapter at {quoted(path)}; give a PEFT folder or a safetensors file{pull}")
    try:
        adapter = told_adapter(source, alpha)
    except AdapterError:
        _refuse_base(source)
        raise
    refuse_alpha(adapter, alpha)
    refuse_broken_numbers(adapter)
    if name is not None:
        check_name(name)
    with open_registry(registry) as catalogue:
        owner, notes = (
            (None, ()) if base is None else name_base_of(base, adapter, catalogue, progress, any_base=any_base)
        )
        with staged_entry(adapter, catalogue, base=owner, any_base=any_base) as entry:
            chosen = _own_name(adapter, source, entry) if name is None else name
            with at_once(catalogue):
                added = entry.add(chosen, tags)
        return replace(added, notes=(*notes, *added.notes))


def _own_name(adapter: AnyAdapter, source: Path, entry: StagedEntry) -> str:
    """Return the default name of an adapter, from its path or else its base.

    Raises:
        AdapterError: all names are generic, or the name belongs to an adapter of which this is not a version.
    """
    from loratool.library.adapter_name import name_by_base, telling_name
    from loratool.library.next_version import refuse_stranger

    told = telling_name(adapter.name, source)
    base = entry.owner.name if entry.owner else entry.facts.base_model
    name = name_from(told or name_by_base(adapter.name, base, adapter.kind))
    refuse_stranger(name, adapter, entry.facts, entry.catalogue, by_base=told is None)
    return name


def _refuse_base(source: Path) -> None:
    """Check that `source` is not a whole model: a folder with weights and a configuration, or a file in such a folder.

    Raises:
        AdapterError: it is one.
    """
    from loratool.checkpoint.model import Checkpoint
    from loratool.errors import AdapterError, CheckpointError, quoted, to_paste

    folder = source if source.is_dir() else source.parent
    if not (folder / "config.json").is_file():
        return
    try:
        Checkpoint.open(folder)
    except CheckpointError:
        return
    try:
        name = name_from(folder.resolve().name)
    except AdapterError:
        name = "NAME"
    raise AdapterError(
        f"{quoted(source)} is a base model, not an adapter; catalogue it with "
        f"{to_paste(f'loratool base add {name} PATH', folder)}"
    )


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
    from loratool.library.entry_files import entry_files, entry_notes

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
    from loratool.library.base_of_adapter import find_base_of

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
        from loratool.library.next_version import same_weights_notes

        owner = self.owner.name if self.owner else None
        record, new = self.catalogue.adapters.add(
            name, self.facts, base=owner, tags=tags, locations=locations, staged=self.staged
        )
        # An adapter that is tied to a base stays so, whatever this file and this call say.
        tied_before = self.owner is None and record.base is not None
        notes = (*self.notes, *same_weights_notes(record, self.catalogue))
        return AddResult(record, new, notes if tied_before else (*notes, *self.base_notes))


def list_adapters(*, base: str | os.PathLike[str] | None = None, kind: str | None = None, tag: str | None = None,
                  sort: SortKey = "name", registry: str | None = None) -> tuple[AdapterSummary, ...]:  # fmt: skip
    """Return the catalogued adapters that pass every filter.

    Args:
        base: only adapters of this base and of its variants: a catalogued name, a folder or a Hub id.
        kind: only adapters of this kind, by its name in `loratool.formats.kinds`.
        tag: only adapters with this tag.
        sort: ``name`` (then version), ``kind`` or ``base``; ``rank``, ``alpha`` or ``size_bytes``, largest first; or
            ``created_at``, newest first.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.

    Raises:
        registry.RegistryError: the catalogue cannot be read, or `base` is not in it.
    """
    url = registry or registry_url()
    name = None if base is None else os.fspath(base)
    if name is not None and (not is_name(name) or Path(name).exists()):
        name = _base_name(name, registry)
    found = list_catalogued(home(), url, base=name, kind=kind, tag=tag, sort=sort)
    if not found:
        _say_if_lost(registry)
    return found


def _say_if_lost(registry: str | None) -> None:
    """Print a warning if the catalogue is empty but the store is not."""
    from loratool.library.opening import open_registry

    with open_registry(registry, read_only=True, settled=False):
        pass


def _base_name(base: str, registry: str | None) -> str:
    """Return the name of the catalogued base that a folder or a Hub id refers to."""
    from loratool.library.base_entry import base_entry
    from loratool.library.opening import open_registry

    with open_registry(registry, read_only=True) as catalogue:
        return base_entry(base, catalogue).name


def tag(adapter: str | os.PathLike[str], tags: Sequence[str], *, remove: bool = False,
        registry: str | None = None) -> AdapterRecord:  # fmt: skip
    """Add tags to an adapter, or remove them; return its new entry.

    Args:
        adapter: ``name`` (its newest version), ``name@version``, or the path or Hub id of a catalogued adapter.
        tags: names; tags that it has already stay.
        remove: remove the tags.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.

    Raises:
        registry.RegistryError: there is no such adapter, a tag is not a valid name, or a tag to remove does not exist.
    """
    from loratool.library.adapter_entry import adapter_entry
    from loratool.library.opening import open_registry

    with open_registry(registry) as catalogue:
        change = catalogue.adapters.untag if remove else catalogue.adapters.tag
        return change(adapter_entry(os.fspath(adapter), catalogue).reference, *tags)


def adapter_json(record: AdapterSummary) -> dict[str, Any]:
    """Return an adapter's entry for ``--json``, with the catalogue's columns as keys."""
    value = {key: item for key, item in asdict(record).items() if key not in {"id", "locations"}}
    value["created_at"] = record.created_at.isoformat()
    value["tags"] = list(record.tags)
    value["version"] = record.version or None
    return value


def facts_from(adapter: AnyAdapter, owner: BaseRecord | None) -> AdapterFacts:
    """Return the catalogue's facts about an adapter. `owner` is its base, or None if that is not catalogued."""
    from loratool.formats.adapter import Adapter
    from loratool.formats.adapter_files import size_of_file
    from loratool.formats.table import OWN

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
    from loratool.formats.facts import lineage_of

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
