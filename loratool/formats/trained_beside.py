"""Weights that were trained with an adapter and lie beside it in files of their own, which no format of adapters is of.

Programs that train a projector, a head or embeddings as well save those so: LLaVA's ``non_lora_trainables.bin``, LongLoRA's
``trainable_params.bin``, TRL's value head in ``pytorch_model.bin``. An adapter without them is not what was trained. Their names
are recorded with the adapter's facts, so that a copy without the files still says so.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from loratool.checkpoint.file_role import WEIGHT_SUFFIXES, FileRole, role_of
from loratool.errors import quoted
from loratool.formats.adapter import Adapter
from loratool.formats.adapter_names import CONFIG_NAME, MODEL_CONFIG, NAMES_IN_FOLDERS
from loratool.formats.identity import AnyAdapter, Identity

Told = TypeVar("Told", bound=Adapter | Identity)

KEY: Final = "trained_beside"
"""Where an adapter's facts list the names."""

MOST_NAMES: Final = 64
LONGEST_NAME: Final = 200


def trained_beside(adapter: AnyAdapter) -> tuple[str, ...]:
    """Return the names of the files with weights that were trained with an adapter, sorted."""
    return recorded(adapter.facts)


def recorded(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names that facts list; what is no such list is passed over."""
    names = facts.get(KEY)
    if not isinstance(names, list):
        return ()
    return tuple(
        sorted({name for name in names[:MOST_NAMES] if isinstance(name, str) and 0 < len(name) <= LONGEST_NAME})
    )


def with_trained_beside(adapter: Told, names: Iterable[str] | None = None) -> Told:
    """Return the adapter with a note and a record of the weights that were trained with it.

    `names` are those of all files in its folder, relative to it; by default the folder on the disk is looked at.
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
    """Return those of the files in an adapter's folder that hold weights which were trained with it.

    A model's weights there are a head's (TRL) where there is no configuration of a model beside them.
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
    """The names of the files around an adapter's own: in its folder, and one folder below; none around a single file."""
    folder = file.parent
    if file.name not in NAMES_IN_FOLDERS and not (folder / CONFIG_NAME).is_file():
        return ()
    found: list[str] = []
    try:
        for entry in os.scandir(folder):
            if entry.is_file():
                found.append(entry.name)
            elif entry.is_dir(follow_symlinks=False):
                found += [f"{entry.name}/{inner.name}" for inner in os.scandir(entry.path) if inner.is_file()]
    except OSError:
        return found
    return found
