"""`loratool.export`: write an adapter as a folder or a single file."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from loratool.errors import OutputError
from loratool.formats.adapter_folder import tokenizer_files
from loratool.formats.adapter_names import SINGLE_FILE_SUFFIXES
from loratool.formats.alpha import Alpha
from loratool.formats.identity import Identity
from loratool.formats.kept_files import write_kept
from loratool.formats.write import write_peft, write_single_file
from loratool.library.places.user_path import user_path
from loratool.library.recording.opening import open_registry
from loratool.library.resolving.resolve import ResolvedAdapter, find_adapter


def export(adapter: str | os.PathLike[str], out: str | os.PathLike[str], *, alpha: Alpha | None = None,
           force: bool = False, registry: str | None = None) -> Path:  # fmt: skip
    """Write an adapter as a PEFT folder or as a single file, and return its path.

    A folder also gets the tokenizer that lies beside the adapter. The files of an adapter that loratool does not compute are
    written unchanged.

    Args:
        adapter: a catalogued name, a path or a Hub id.
        out: a folder; or a file, with the suffix ``.safetensors`` or ``.st``, or that of a file that is written unchanged.
        alpha: alpha of a bare adapter file that does not state it: a number, or ``rank`` for each module's rank.
        force: replace an adapter that loratool wrote.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.

    Raises:
        LoratoolError, registry.RegistryError: there is no such adapter, or `out` exists.
    """
    if not os.fspath(out):
        raise OutputError("the output's path is empty; give --out a folder or file")
    target = user_path(out)
    with open_registry(registry, read_only=True) as catalogue:
        named = find_adapter(adapter, catalogue, alpha)
        if isinstance(named.adapter, Identity):
            write_kept(named.adapter, target, force=force)
            return target
        found = ResolvedAdapter(named.adapter, named.record, hub_id=named.hub_id)
        facts = dict(found.adapter.facts) | {"schema": 1, "kind": found.adapter.kind}
        if found.base_fingerprint:
            facts["base_fingerprint"] = found.base_fingerprint
        exported = replace(found.adapter, facts=facts)
        if target.suffix in SINGLE_FILE_SUFFIXES:
            write_single_file(exported, target, force=force)
        else:
            write_peft(exported, target, force=force, beside=tokenizer_files(found.adapter))
    return target
