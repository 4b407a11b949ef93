"""Weights that were trained with an adapter but are in separate files beside it, in no adapter format.

Programs save a projector, a head or embeddings like this if they train them too: LLaVA's ``non_lora_trainables.bin``, LongLoRA's
``trainable_params.bin``, TRL's value head in ``pytorch_model.bin``. Without them an adapter does not behave as trained. Their
names are recorded in the adapter's facts, so that a copy without the files still mentions them.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from loratool.checkpoint.file_role import WEIGHT_SUFFIXES, FileRole, role_of
from loratool.checkpoint.model import is_file
from loratool.errors import quoted
from loratool.formats.adapter import Adapter
from loratool.formats.adapter_names import CONFIG_NAME, MODEL_CONFIG, NAMES_IN_FOLDERS
from loratool.formats.identity import AnyAdapter, Identity

SomeAdapter = TypeVar("SomeAdapter", bound=Adapter | Identity)

KEY: Final = "trained_beside"
"""Key of the names in an adapter's facts."""

MOST_NAMES: Final = 64
LONGEST_NAME: Final = 200


def trained_beside(adapter: AnyAdapter) -> tuple[str, ...]:
    """Return the names of the files with weights that were trained with an adapter, sorted."""
    return recorded(adapter.facts)


def recorded(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names that facts list; an invalid list is ignored."""
    names = facts.get(KEY)
    if not isinstance(names, list):
        return ()
    return tuple(
        sorted({name for name in names[:MOST_NAMES] if isinstance(name, str) and 0 < len(name) <= LONGEST_NAME})
    )


def with_trained_beside(adapter: SomeAdapter, names: Iterable[str] | None = None) -> SomeAdapter:
    """Return the adapter with a note and a record of the weights that were trained with it.

    `names` are all files in its folder, relative to it; by default they are read from the disk.
    """
    lying = _names_in_folder(adapter.file) if names is None else names
    found = sorted({*trained_in(lying), *recorded(adapter.facts)})[:MOST_NAMES]
    if not found:
        return adapter
    more = f" and {len(found) - 1:,} more" if found[1:] else ""
    note = f"{quoted(adapter.name)} was trained with weights that no adapter's file holds: {quoted(found[0])}{more} beside it"
    others = (each for each in adapter.notes if "was trained with weights that no adapter's file holds" not in each)
    return replace(adapter, facts={**adapter.facts, KEY: found}, notes=(*others, note))


def trained_in(names: Iterable[str]) -> list[str]:
    """Return the files in an adapter's folder that contain weights trained with it.

    Weights with a model's file name are a value head's (TRL) if no model configuration is beside them.
    """
    names = list(names)
    is_model = MODEL_CONFIG in names
    return [name for name in names if _is_trained(name, is_model=is_model)]


def _is_trained(name: str, *, is_model: bool) -> bool:
    role = role_of(name)
    if role is FileRole.MODEL_WEIGHTS and not is_model:
        return Path(name).suffix in WEIGHT_SUFFIXES
    return role is FileRole.TRAINED_BESIDE and len(name) <= LONGEST_NAME


def _names_in_folder(file: Path) -> Collection[str]:
    """Return the names of the files in an adapter's folder and one folder below; none for a single file."""
    folder = file.parent
    if file.name not in NAMES_IN_FOLDERS and not (folder / CONFIG_NAME).is_file():
        return ()
    found: list[str] = []
    try:
        for entry in os.scandir(folder):
            if is_file(entry):
                found.append(entry.name)
            elif entry.is_dir(follow_symlinks=False):
                found += [f"{entry.name}/{inner.name}" for inner in os.scandir(entry.path) if is_file(inner)]
    except OSError:
        return found
    return found
