"""Writing of new adapters that are made from others, and cataloguing them as children."""

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
from loratool.library.places.user_path import exists, user_path
from loratool.library.recording.new_adapter import AddResult, at_once, facts_of, staged_entry
from loratool.library.recording.next_version import refuse_stranger
from loratool.library.resolving.adapter_name import name_from, specific_name
from loratool.library.resolving.resolve import ResolvedAdapter
from registry import AdapterRecord, Registry, RegistryUnwritableError, uncatalogued


@dataclass(frozen=True, slots=True)
class Origin:
    """An adapter or model that a new adapter is made from.

    Attributes:
        parent: its catalogue entry, or its name if it is not catalogued.
        sha256: of its weights.
        states: states of its files when they were opened.
    """

    parent: AdapterRecord | str
    sha256: str | None = None
    states: tuple[FileState, ...] = ()


@dataclass(frozen=True, slots=True)
class Child:
    """A new adapter in a draft, with its output path, its name in the catalogue, and details of how it was made.

    `named` says whether the user chose the name. The name of an output may be that of an unrelated adapter.
    """

    adapter: Adapter
    out: Path
    name: str
    details: Mapping[str, Any]
    named: bool = True


def default_output(source: ResolvedAdapter, given: str | os.PathLike[str], suffix: str) -> Path:
    """Return the default output path, such as ``dylora-r16.st`` beside ``dylora.st``, or a folder beside a folder.

    For a catalogued name or a Hub id it is a file in the working folder. `given` is the user's argument for the adapter;
    `suffix` (``r16``) is added to its name.
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
    """Return the nearest existing folder above `out`, as a place for its draft."""
    return next(folder for folder in Path(os.path.abspath(out)).parents if folder.is_dir())


def bring_up(children: Sequence[Child], catalogue: Registry, operation: str, origins: Sequence[Origin], *,
             base: str | None, force: bool = False) -> list[AddResult]:  # fmt: skip
    """Write new adapters, and catalogue them as children of their origins: all of them, or none.

    Entries and lineage are one transaction, at whose end the files get their final names. An earlier failure leaves nothing.
    A kill between the renames and the commit leaves complete files that are not catalogued. If the catalogue cannot be
    written (a full disk, another user's home), the files are written with a note.

    Args:
        children: the new adapters, with different outputs.
        catalogue: the catalogue for their entries.
        operation: name of the command.
        origins: the adapters or models that each of them was made from.
        base: the catalogued base that they belong to; by default the one that they record.
        force: replace adapters that loratool wrote.

    Raises:
        LoratoolError: an output exists or cannot be written, an adapter does not fit `base`, a source file changed, or the name
            of an output belongs to an unrelated adapter.
        registry.RegistryError: the catalogue does not accept one of them.
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
                for adapter, entry, child in zip(written, entries, children, strict=True):
                    if not child.named:
                        refuse_stranger(child.name, adapter, entry.facts, writable, by_base=False)
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
        # A cut to the full rank can have the very bytes of the adapter that it is made from.
        if not (isinstance(origin.parent, AdapterRecord) and origin.parent.id == record.id):
            catalogue.lineage.record(record, origin.parent, operation, parent_sha256=origin.sha256, details=details)


def origin_of(parent: ResolvedAdapter) -> Origin:
    """Return an adapter as the origin of another."""
    return Origin(parent.record or parent.adapter.name, parent.adapter.sha256, parent.adapter.states)


def reference_of(parent: ResolvedAdapter) -> str:
    """Return ``name@version``, or the name if it is not catalogued, with ``@rank=b`` if a rank was chosen."""
    return parent.reference if parent.record else parent.label


def base_of(parents: Sequence[ResolvedAdapter]) -> str | None:
    """Return the catalogued base of the first of `parents` that has one."""
    return next((parent.record.base for parent in parents if parent.record and parent.record.base), None)


def child_facts(
    kind: str, operation: str, parents: Sequence[ResolvedAdapter], details: Mapping[str, Any]
) -> dict[str, Any]:
    """Return loratool's facts for the file of a new adapter: its kind, base, parents and operation."""
    base = next((parent.base_fingerprint for parent in parents if parent.base_fingerprint), None)
    named = [{"name": parent.adapter.name, "sha256": parent.adapter.sha256} for parent in parents]
    beside = sorted({name for parent in parents for name in trained_beside(parent.adapter)})
    facts = {"schema": 1, "kind": kind, "lineage": {"operation": operation, "parents": named, **details}}
    return facts | ({"base_fingerprint": base} if base else {}) | ({KEY: beside} if beside else {})


def default_name(out: Path) -> str:
    """Return the catalogue name of an adapter written to `out`: that of the file or folder, or of a folder above."""
    stem = out.stem if out.suffix in SINGLE_FILE_SUFFIXES else out.name
    return name_from(specific_name(stem, out) or stem)
