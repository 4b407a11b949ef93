"""What operations on adapters share: where a new adapter is written, and how it is catalogued as a child."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.formats.adapter import Adapter
from loratool.formats.read import SINGLE_FILE_SUFFIXES, read_adapter
from loratool.formats.write import write_peft, write_single_file
from loratool.library.adapters import enter, name_from
from loratool.library.resolve import ResolvedAdapter, user_path
from registry import AdapterRecord, Registry, check_name


@dataclass(frozen=True, slots=True)
class Derived:
    """A new adapter: the file or folder that holds it, its catalogue entry, and notes."""

    out: Path
    record: AdapterRecord
    notes: tuple[str, ...]


def default_output(source: ResolvedAdapter, given: str | os.PathLike[str], suffix: str) -> Path:
    """``dylora-r16.st`` beside ``dylora.st``; a folder beside a folder; for a catalogued name, in the working folder.

    `given` is how the user named the adapter, `suffix` what is added to its name (``r16``).
    """
    path = user_path(given)
    if source.record is not None and source.record.name == os.fspath(given).partition("@")[0]:
        return Path(f"{source.record.name}-{suffix}.safetensors")
    if path.is_dir():
        return path.resolve().with_name(f"{path.resolve().name}-{suffix}")
    return path.with_name(f"{path.stem}-{suffix}{path.suffix}")


def write_adapter(adapter: Adapter, out: Path, *, force: bool = False) -> Adapter:
    """Write an adapter as a single file (``.safetensors``, ``.st``) or a PEFT directory; what was written, read again.

    Raises:
        OutputError: `out` exists, or cannot be written.
    """
    write = write_single_file if out.suffix in SINGLE_FILE_SUFFIXES else write_peft
    write(adapter, out, force=force)
    return read_adapter(out)


def scratch_folder(out: Path) -> Path:
    """The nearest folder above `out` that is there already: where a draft of it can lie."""
    return next(folder for folder in Path(os.path.abspath(out)).parents if folder.is_dir())


def catalogue_child(
    written: Adapter,
    catalogue: Registry,
    parents: Sequence[ResolvedAdapter],
    operation: str,
    details: Mapping[str, Any],
    *,
    name: str,
) -> tuple[AdapterRecord, tuple[str, ...]]:
    """Catalogue a new adapter as the child of those that it was made from, and of their base; its entry, and notes.

    `operation` is the command's name, `details` the figures that belong to it.

    Raises:
        registry.RegistryError: the name cannot be used.
    """
    check_name(name, "adapter")
    base = next((parent.record.base for parent in parents if parent.record and parent.record.base), None)
    added = enter(replace(written, name=name), catalogue, name=name, base=base)
    for parent in parents:
        catalogue.lineage.record(
            added.record,
            parent.record or parent.adapter.name,
            operation,
            parent_sha256=parent.adapter.sha256,
            details=details,
        )
    return added.record, added.notes


def child_facts(
    kind: str, operation: str, parents: Sequence[ResolvedAdapter], details: Mapping[str, Any]
) -> dict[str, Any]:
    """What loratool records in the file of a new adapter: its kind, its base, and what it was made from and how."""
    base = next((parent.base_fingerprint for parent in parents if parent.base_fingerprint), None)
    named = [{"name": parent.adapter.name, "sha256": parent.adapter.sha256} for parent in parents]
    facts = {"schema": 1, "kind": kind, "lineage": {"operation": operation, "parents": named, **details}}
    return facts | ({"base_fingerprint": base} if base else {})


def default_name(out: Path) -> str:
    """The name in the catalogue of an adapter written to `out`: the file's or folder's own."""
    return name_from(out.stem if out.suffix in SINGLE_FILE_SUFFIXES else out.name, out)
