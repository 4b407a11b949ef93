"""`loratool.add`: catalogue an adapter, with a copy of its files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loratool.checkpoint.model import Checkpoint
from loratool.errors import AdapterError, CheckpointError, NotFoundError, quoted, to_paste
from loratool.formats.alpha import Alpha
from loratool.formats.identify import read_or_identify, refuse_alpha, refuse_broken_numbers
from loratool.formats.identity import AnyAdapter
from loratool.library.places.user_path import HUB_ID, exists, user_path
from loratool.library.recording.base_of_adapter import name_base_of
from loratool.library.recording.new_adapter import AddResult, StagedEntry, at_once, staged_entry
from loratool.library.recording.next_version import refuse_stranger
from loratool.library.recording.opening import open_registry
from loratool.library.reporting.progress import Progress
from loratool.library.resolving.adapter_name import name_by_base, name_from, specific_name
from registry import check_name


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
    source = user_path(path)
    if not os.fspath(path) or not exists(source):
        is_hub_id = HUB_ID.fullmatch(os.fspath(path)) is not None
        pull = f", or get one from the Hub with 'loratool pull {path}'" if is_hub_id else ""
        raise NotFoundError(f"there is no adapter at {quoted(path)}; give a PEFT folder or a safetensors file{pull}")
    try:
        adapter = read_or_identify(source, alpha)
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
    specific = specific_name(adapter.name, source)
    base = entry.owner.name if entry.owner else entry.facts.base_model
    name = name_from(specific or name_by_base(adapter.name, base, adapter.kind))
    refuse_stranger(name, adapter, entry.facts, entry.catalogue, by_base=specific is None)
    return name


def _refuse_base(source: Path) -> None:
    """Check that `source` is not a whole model: a folder with weights and a configuration, or a file in such a folder.

    Raises:
        AdapterError: it is one.
    """
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
