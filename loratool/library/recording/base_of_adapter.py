"""Search for the catalogued base of an adapter: the user's choice, or the one that it records by fingerprint or by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain, count

from loratool.checkpoint.model import Checkpoint
from loratool.errors import LoratoolError, PlacementError, WrongBaseError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.identity import AnyAdapter
from loratool.formats.modules_in_base import are_names_of_base, refuse_unlanded_names
from loratool.hub.address import is_hub_id
from loratool.library.checking.stated_base import other_base_notes
from loratool.library.places.user_path import exists, user_path
from loratool.library.reporting.progress import Progress, Silent
from loratool.library.resolving.adapter_name import name_from
from loratool.library.resolving.base_entry import find_base
from loratool.library.resolving.hub_bases import is_away, known_headers
from loratool.library.resolving.resolve import ResolvedAdapter, is_entry_of, no_such_base, resolve_base
from loratool.merging.plan import WeightedAdapter, plan_merge
from loratool.merging.untied import untied
from registry import AdapterRecord, BaseRecord, Registry, check_name, is_name


def find_base_of(adapter: AnyAdapter, base: str | None, base_model: str | None, catalogue: Registry, *,
               any_base: bool = False) -> tuple[BaseRecord | None, list[str]]:  # fmt: skip
    """Return the catalogued base of an adapter, checked by names and shapes, and notes on how it was found.

    `base_model` is the name of its base in the adapter's configuration or card.

    Raises:
        WrongBaseError: it records another base than `base`, or is tied to another one, and `any_base` is off.
        LoratoolError: it does not fit `base`.
    """
    recorded = adapter.base_fingerprint
    if base is not None:
        record = catalogue.bases.find(check_name(base, "base"))
        problem = _other_base(adapter, record.name, record.fingerprint, catalogue)
        if problem and not any_base:
            raise WrongBaseError(f"{problem}; leave --base out, or give --any-base")
        _refuse_unfit(adapter, record)
        notes = [f"{problem}; tied to it all the same, with --any-base"] if problem else []
        notes += _fit_notes(adapter, record)
        decided = bool(problem or (recorded and record.fingerprint))
        return record, notes if decided else [*notes, *other_base_notes(adapter, record.name, record.path, record)]
    tied = next((entry.base for entry in _entries(adapter, catalogue) if entry.base), None)
    if tied is not None:
        return catalogue.bases.find(tied), []
    if recorded:
        known = catalogue.bases.find_by_fingerprint(recorded)
        if known:
            _refuse_false_record(adapter, known[0])
            return known[0], _fit_notes(adapter, known[0])
    named = [record for record in catalogue.bases.list() if base_model and _is_called(record, base_model)]
    for record in named:
        # The fingerprint of a base that is not downloaded yet is compared after the download.
        if recorded and record.fingerprint:
            continue
        try:
            _refuse_unfit(adapter, record)
        except LoratoolError:
            break
        by_name = f"it names {quoted(record.source)} as its base, which is catalogued as {quoted(record.name)}"
        return record, [by_name, *_fit_notes(adapter, record)]
    return None, [_how_to_tie(base_model, known_by_content=bool(recorded), unfit=bool(named))]


def name_base_of(base: str | os.PathLike[str], adapter: AnyAdapter, catalogue: Registry, progress: Progress | None = None, *,
               any_base: bool = False) -> tuple[str, tuple[str, ...]]:  # fmt: skip
    """Return the catalogued name of the base that a user gives by name, path or Hub id, and notes.

    A base that is not catalogued yet is catalogued under the name of its folder or repository, if the adapter fits it.

    Raises:
        LoratoolError, registry.RegistryError: there is no such base, or the adapter belongs to another one and `any_base`
            is off.
    """
    from loratool.library.recording.new_base import look_at_base

    text = os.fspath(base)
    known = find_base(text, catalogue, progress)
    if known is not None:
        return known.name, ()
    if is_name(text) and not exists(user_path(text)):
        raise no_such_base(text, catalogue)
    source = resolve_base(text, catalogue, progress, download=False)
    _refuse_unlanded(adapter, source.open())
    name = _free_name(source.name, catalogue)
    found = look_at_base(name, text, catalogue, watcher=progress or Silent())
    problem = _other_base(adapter, name, found.fingerprint, catalogue)
    if problem and not any_base:
        raise WrongBaseError(f"{problem}; leave --base out, or give --any-base")
    found.add(name, catalogue)
    taken = "" if name == source.name else f" ({quoted(source.name)} is another model)"
    return name, (f"catalogued {quoted(text)} as the base {quoted(name)}{taken}",)


def _free_name(stem: str, catalogue: Registry) -> str:
    """Return a free name for a new base, from its folder or repository: ``smollm2``, or ``smollm2-2`` if that is taken."""
    name = name_from(stem)
    numbered = (f"{name[:90]}-{number}" for number in count(2))
    return next(each for each in chain([name], numbered) if catalogue.bases.get(each) is None)


def base_of_all(adapters: Sequence[ResolvedAdapter], catalogue: Registry) -> str:
    """Return the catalogued name of the base that adapters are tied to, as the catalogue or their files record it.

    Raises:
        LoratoolError: they are not tied to a catalogued base, or to different ones.
    """
    found_owners = [(found.reference, recorded_base(found, catalogue)) for found in adapters]
    owners = [(reference, owner) for reference, owner in found_owners if owner is not None]
    if owners and all(_is_same(owners[0][1], owner, catalogue) for _, owner in owners):
        return owners[0][1].name
    if not owners:
        labels = " and ".join(quoted(each.adapter.name) for each in adapters)
        raise LoratoolError(
            f"{labels} {'is' if len(adapters) == 1 else 'are'} tied to no catalogued base; say which model to merge into "
            "with --into BASE (a name, a folder or a Hub id)"
        )
    said = ", ".join(f"{quoted(reference)} to {quoted(owner.name)}" for reference, owner in owners)
    raise LoratoolError(f"the adapters are tied to different bases ({said}); say which one is meant with --into BASE")


def _is_same(base: BaseRecord, other: BaseRecord, catalogue: Registry) -> bool:
    """Return whether two entries are of one model, by the families of their fingerprints or else by name."""
    if base.fingerprint is None or other.fingerprint is None:
        return (base.variant_of or base.name) == (other.variant_of or other.name)
    return catalogue.bases.same_family(base.fingerprint, other.fingerprint)


def recorded_base(found: ResolvedAdapter, catalogue: Registry) -> BaseRecord | None:
    """Return the catalogued base of an adapter: that of its entry, else by the fingerprint or name that its files record."""
    if found.record is not None and found.record.base is not None:
        return catalogue.bases.get(found.record.base)
    if found.base_fingerprint is not None:
        return next(iter(catalogue.bases.find_by_fingerprint(found.base_fingerprint)), None)
    named = found.record.base_model if found.record else found.adapter.base_model
    return _base_called(named, catalogue)


def recorded_base_of(adapter: AnyAdapter, catalogue: Registry) -> BaseRecord | None:
    """Return the catalogued base of an uncatalogued adapter, by the fingerprint or name that its files record."""
    if adapter.base_fingerprint is not None:
        return next(iter(catalogue.bases.find_by_fingerprint(adapter.base_fingerprint)), None)
    return _base_called(adapter.base_model, catalogue)


def _base_called(name: str | None, catalogue: Registry) -> BaseRecord | None:
    return next((base for base in catalogue.bases.list() if name and _is_called(base, name)), None)


def _other_base(adapter: AnyAdapter, base: str, fingerprint: str | None, catalogue: Registry) -> str | None:
    """Return why a base with this name and fingerprint is not the one that an adapter records or is tied to; None if it is."""
    recorded = adapter.base_fingerprint
    if recorded and fingerprint and not catalogue.bases.same_family(recorded, fingerprint):
        return (
            f"{quoted(adapter.name)} records another base ({recorded[:12]}…) than {quoted(base)} ({fingerprint[:12]}…)"
        )
    for entry in _entries(adapter, catalogue):
        if entry.base_fingerprint and fingerprint:
            is_other = not catalogue.bases.same_family(entry.base_fingerprint, fingerprint)
        else:
            is_other = entry.base not in (None, base)
        if is_other:
            what = quoted(entry.base) if entry.base else f"the base {str(entry.base_fingerprint)[:12]}…"
            return f"{quoted(adapter.name)} is tied to {what}, as {entry.reference}, and {quoted(base)} is another"
    return None


def _entries(adapter: AnyAdapter, catalogue: Registry) -> list[AdapterRecord]:
    """Return the catalogue's entries of exactly this adapter, newest first."""
    return [entry for entry in catalogue.adapters.find_by_sha256(adapter.sha256) if is_entry_of(entry, adapter)]


def _is_called(record: BaseRecord, base_model: str) -> bool:
    """Return whether a base came from the repository or folder of this name. The Hub ignores the case of letters."""
    return record.source == base_model or ("/" in base_model and record.source.casefold() == base_model.casefold())


def _how_to_tie(base_model: str | None, *, known_by_content: bool, unfit: bool) -> str:
    if base_model and is_hub_id(base_model) and not unfit:
        name = base_model.rpartition("/")[2]
        how = f"its base is not catalogued yet; add it with 'loratool base add {name} {base_model}'"
        return how if known_by_content else f"{how}, then tie this to it with --base {name}"
    if known_by_content:
        return "its base is not catalogued yet; add it with 'loratool base add'"
    hint = f" (its configuration names {quoted(base_model)})" if base_model else ""
    return f"it is tied to no base yet{hint}; add it again with --base NAME to tie it to one"


def _refuse_false_record(adapter: AnyAdapter, record: BaseRecord) -> None:
    """Raise WrongBaseError if the adapter does not land on the base whose fingerprint it records: its record is false."""
    try:
        _refuse_unfit(adapter, record)
    except PlacementError as error:
        line = str(error).split("\n")[0]
        raise WrongBaseError(
            f"{quoted(adapter.name)} records {quoted(record.name)} as its base but does not land on it ({line}); ask its "
            "author, or do not use it"
        ) from None


def _refuse_unfit(adapter: AnyAdapter, record: BaseRecord) -> None:
    """Raise LoratoolError if the adapter does not land on the base. Nothing is checked if the base's files are missing."""
    if is_away(record):
        checkpoint = known_headers(record)
    else:
        checkpoint = Checkpoint.open(record.path) if record.path is not None and exists(record.path) else None
    if checkpoint is not None:
        _refuse_unlanded(adapter, checkpoint)


def _fit_notes(adapter: AnyAdapter, record: BaseRecord) -> list[str]:
    """Return a note on how far an adapter that loratool does not compute was compared with its base."""
    if isinstance(adapter, Adapter):
        return []
    if are_names_of_base(adapter):
        return [f"only the names of its modules were compared with those of {quoted(record.name)}"]
    return [f"it was not compared with {quoted(record.name)}, since its file uses other names for modules"]


def _refuse_unlanded(adapter: AnyAdapter, checkpoint: Checkpoint) -> None:
    """Raise PlacementError if the adapter does not land on these tensors, nor on those of the untied base.

    For an adapter that loratool does not compute, only the names of its modules are compared.
    """
    if not isinstance(adapter, Adapter):
        refuse_unlanded_names(adapter, checkpoint.tensors)
        return
    try:
        plan_merge([WeightedAdapter(adapter)], checkpoint)
    except PlacementError as error:
        try:
            plan_merge([WeightedAdapter(adapter)], untied(checkpoint, [adapter]))
        except LoratoolError:
            raise error from None
