"""What operations on adapters share: where new adapters are written, and how they are catalogued as children."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.checkpoint.file_state import FileState, refuse_changed_meanwhile
from loratool.errors import quoted
from loratool.formats.adapter import Adapter
from loratool.formats.adapter_names import SINGLE_FILE_SUFFIXES
from loratool.formats.trained_beside import KEY, trained_beside
from loratool.formats.write import staged_adapter
from loratool.library.adapter_name import name_from, telling_name
from loratool.library.adapters import AddResult, at_once, facts_of, staged_entry
from loratool.library.resolve import ResolvedAdapter
from loratool.library.user_path import exists, user_path
from registry import AdapterRecord, Registry, RegistryUnwritableError, uncatalogued


@dataclass(frozen=True, slots=True)
class Origin:
    """What a new adapter came from: a catalogue entry, or the name of what is not catalogued, with its sha256 and the states of
    its files when they were opened."""

    parent: AdapterRecord | str
    sha256: str | None = None
    states: tuple[FileState, ...] = ()


@dataclass(frozen=True, slots=True)
class Child:
    """A new adapter, in a draft: where it is to be written, its name in the catalogue, and the figures of its making."""

    adapter: Adapter
    out: Path
    name: str
    details: Mapping[str, Any]


def default_output(source: ResolvedAdapter, given: str | os.PathLike[str], suffix: str) -> Path:
    """``dylora-r16.st`` beside ``dylora.st``; a folder beside a folder; for a catalogued name, in the working folder.

    `given` is how the user named the adapter, `suffix` what is added to its name (``r16``).
    """
    path = user_path(given)
    if source.record is not None and source.record.name == os.fspath(given).partition("@")[0]:
        return Path(f"{source.record.name}-{suffix}.safetensors")
    if not exists(path):  # a Hub id
        return Path(f"{source.adapter.name}-{suffix}.safetensors")
    if path.is_dir():
        return path.resolve().with_name(f"{path.resolve().name}-{suffix}")
    return path.with_name(f"{path.stem}-{suffix}{path.suffix}")


def scratch_folder(out: Path) -> Path:
    """The nearest folder above `out` that is there already: where a draft of it can lie."""
    return next(folder for folder in Path(os.path.abspath(out)).parents if folder.is_dir())


def bring_up(children: Sequence[Child], catalogue: Registry, operation: str, origins: Sequence[Origin], *,
             base: str | None, force: bool = False) -> list[AddResult]:  # fmt: skip
    """Write new adapters, and catalogue them as children of what they came from: all of them, or none.

    Their entries and lineage are one transaction, and the files get their final names at its end: whatever fails before
    leaves nothing. A kill between the names and the commit leaves whole files that are not catalogued. Where nothing can be
    written to the catalogue, on a full disk or in somebody else's home, the files are written all the same, with a note.

    Args:
        children: each with an output of its own.
        catalogue: that they are entered in.
        operation: the command's name.
        origins: what each of them came from.
        base: the catalogued base that they belong to; None for the one that they record.
        force: replace adapters that loratool wrote before.

    Raises:
        LoratoolError: an output exists or cannot be written, an adapter does not fit `base`, or a file changed that one was
            made from.
        registry.RegistryError: the catalogue cannot take one.
    """
    with ExitStack() as outputs:
        written = [
            replace(outputs.enter_context(staged_adapter(child.adapter, child.out, force=force)), name=child.name)
            for child in children
        ]
        refuse_changed_meanwhile(state for origin in origins for state in origin.states)
        try:
            with catalogue.for_writing() as writable, ExitStack() as stages:
                entries = [stages.enter_context(staged_entry(adapter, writable, base=base)) for adapter in written]
                with at_once(writable):
                    added = [entry.add(child.name) for entry, child in zip(entries, children, strict=True)]
                    for result, child in zip(added, children, strict=True):
                        _record_lineage(result.record, origins, writable, operation, child.details)
                    outputs.close()
        except RegistryUnwritableError as error:
            added = [_not_catalogued(adapter, catalogue, base, error) for adapter in written]
    return added


def _not_catalogued(adapter: Adapter, catalogue: Registry, base: str | None, error: Exception) -> AddResult:
    facts, _, notes = facts_of(adapter, catalogue, base=base)
    problem = f"{quoted(adapter.name)} is written, and the catalogue does not know of it: {error}"
    return AddResult(uncatalogued(adapter.name, facts), False, (*adapter.notes, *notes, problem))


def _record_lineage(
    record: AdapterRecord, origins: Sequence[Origin], catalogue: Registry, operation: str, details: Mapping[str, Any]
) -> None:
    for origin in origins:
        # A cut to the full rank, made again, is the very adapter that it is made of.
        if not (isinstance(origin.parent, AdapterRecord) and origin.parent.id == record.id):
            catalogue.lineage.record(record, origin.parent, operation, parent_sha256=origin.sha256, details=details)


def origin_of(parent: ResolvedAdapter) -> Origin:
    """An adapter as what another came from."""
    return Origin(parent.record or parent.adapter.name, parent.adapter.sha256, parent.adapter.states)


def reference_of(parent: ResolvedAdapter) -> str:
    """``name@version``, or the name of an adapter that is not catalogued; with ``@rank=b`` where one was chosen."""
    return parent.reference if parent.record else parent.label


def base_of(parents: Sequence[ResolvedAdapter]) -> str | None:
    """The catalogued base of the first of `parents` that has one."""
    return next((parent.record.base for parent in parents if parent.record and parent.record.base), None)


def child_facts(
    kind: str, operation: str, parents: Sequence[ResolvedAdapter], details: Mapping[str, Any]
) -> dict[str, Any]:
    """What loratool records in the file of a new adapter: its kind, its base, and what it was made from and how."""
    base = next((parent.base_fingerprint for parent in parents if parent.base_fingerprint), None)
    named = [{"name": parent.adapter.name, "sha256": parent.adapter.sha256} for parent in parents]
    beside = sorted({name for parent in parents for name in trained_beside(parent.adapter)})
    facts = {"schema": 1, "kind": kind, "lineage": {"operation": operation, "parents": named, **details}}
    return facts | ({"base_fingerprint": base} if base else {}) | ({KEY: beside} if beside else {})


def default_name(out: Path) -> str:
    """The name in the catalogue of an adapter written to `out`: the file's or folder's own, or that of a folder above."""
    stem = out.stem if out.suffix in SINGLE_FILE_SUFFIXES else out.name
    return name_from(telling_name(stem, out) or stem)
