"""Relation of a new adapter to catalogued ones: a next version, an unrelated one of the same name, or the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loratool.errors import AdapterError, quoted
from loratool.formats.facts import parents_of
from loratool.library.resolving.resolve import numbers_of
from registry import AdapterFacts, AdapterRecord

if TYPE_CHECKING:
    from loratool.formats.identity import AnyAdapter
    from registry import Registry

SHOWN: Final = 5
"""Largest number of names that a message lists."""


def refuse_stranger(name: str, adapter: AnyAdapter, facts: AdapterFacts, catalogue: Registry, *, by_base: bool) -> None:
    """Raise AdapterError if the default `name` belongs to adapters of which this one is not a version.

    It is a version of an adapter with the same weights, a common ancestor, or the same base and targets. If the name is made
    from the base and the kind (`by_base`), only the same weights count, since unrelated adapters share such names.
    """
    versions = catalogue.adapters.versions(name)
    reasons = [_why_other(adapter, facts, each, catalogue) for each in versions]
    if not versions or (None in reasons and not by_base):
        return
    if any(each.sha256 == facts.sha256 for each in versions):
        return
    newest = versions[-1]
    why = reasons[-1] or "they share only the base and the kind, from which the name is made"
    raise AdapterError(
        f"{quoted(name)} is catalogued already, and this is not a version of {newest.reference}: {why}; give it a name of its "
        f"own with --name, or --name {name} to make it the next version of that one"
    )


def same_weights_notes(record: AdapterRecord, catalogue: Registry) -> tuple[str, ...]:
    """Return notes on other entries with the same weights, which are the same adapter or scale the weights differently."""
    others = [each for each in catalogue.adapters.find_by_sha256(record.sha256) if each.id != record.id]
    same = [each.reference for each in others if numbers_of(each) == numbers_of(record)]
    scaled = [each.reference for each in others if numbers_of(each) != numbers_of(record)]
    notes = [f"it has the same weights as {_listed(same)}"] if same else []
    if scaled:
        notes.append(f"it has the same weights as {_listed(scaled)}, with another kind, alpha or scaling")
    return tuple(notes)


def _why_other(adapter: AnyAdapter, facts: AdapterFacts, known: AdapterRecord, catalogue: Registry) -> str | None:
    """Return why an adapter is not a version of a catalogued one; None if it may be."""
    if facts.sha256 == known.sha256 or _has_ancestor_in_common(adapter, known, catalogue):
        return None
    if _is_of_other_base(facts, known, catalogue):
        return f"that one belongs to {_base(known)}, this one to {_base(facts)}"
    ours, theirs = _targets(facts), _targets(known)
    if ours != theirs:
        return f"that one targets {_listed(theirs) or 'no modules'}, this one {_listed(ours) or 'no modules'}"
    if set(facts.ranks or ()) != set(known.ranks or ()):
        return "it changes other layers"
    return None


def _has_ancestor_in_common(adapter: AnyAdapter, known: AdapterRecord, catalogue: Registry) -> bool:
    parents = set(parents_of(adapter.facts))
    if not parents:
        return False
    family = {known.sha256} | {edge.parent_sha256 for edge in catalogue.lineage.ancestors(known)}
    above = {
        edge.parent_sha256
        for parent in parents
        for entry in catalogue.adapters.find_by_sha256(parent)
        for edge in catalogue.lineage.ancestors(entry)
    }
    return bool(family & (parents | above) - {None})


def _is_of_other_base(facts: AdapterFacts, known: AdapterRecord, catalogue: Registry) -> bool:
    """Return whether both bases are known and different."""
    if facts.base_fingerprint and known.base_fingerprint:
        return not catalogue.bases.same_family(facts.base_fingerprint, known.base_fingerprint)
    if facts.base_model and known.base_model:
        return _last(facts.base_model) != _last(known.base_model)
    return False


def _last(base_model: str) -> str:
    return Path(base_model).name.casefold()


def _base(entry: AdapterFacts | AdapterRecord) -> str:
    named = entry.base if isinstance(entry, AdapterRecord) else None
    return f"the base {quoted(named or entry.base_model or str(entry.base_fingerprint)[:12], 60)}"


def _targets(entry: AdapterFacts | AdapterRecord) -> list[str]:
    targets = entry.target_modules
    return [targets] if isinstance(targets, str) else sorted(targets or ())


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
