"""The files of the folder ``families``, and the choice of a model's file. Each file is read once, at its first use."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any, Final

from loratool.architecture.family import Family, parse_family
from loratool.errors import LoratoolError, quoted

FOLDER: Final = Path(__file__).parent / "families"
GENERIC: Final = "generic"
"""The family of every model, whose facts hold unless another file says something else."""

LARGEST: Final = 1 << 16
"""The largest size of a file in bytes."""


@cache
def family_of(model_type: str, folder: Path = FOLDER) -> Family:
    """Return the family of models with this ``model_type``, without generic facts; an empty one if no file covers it.

    Raises:
        LoratoolError: a file cannot be read, or two files cover the same model.
    """
    if model_type in _names(folder) and model_type in family_named(model_type, folder).models:
        return family_named(model_type, folder)
    quoted_type = f'"{model_type}"'
    # Parsing all files would take ten times as long as searching them for the name.
    candidates = [name for name in _names(folder) if quoted_type in _text(name, folder)]
    families = [family for family in (family_named(name, folder) for name in candidates) if model_type in family.models]
    if len(families) > 1:
        names = " and ".join(quoted(f"{family.name}.json") for family in families)
        raise LoratoolError(f"{names} in {quoted(folder)} are both about {quoted(model_type)}; keep one of them")
    return families[0] if families else Family(model_type)


def models_with_layers(folder: Path = FOLDER) -> tuple[str, ...]:
    """Return the model types whose layers are known, sorted."""
    families = (family_named(name, folder) for name in _names(folder))
    return tuple(sorted(model for family in families if family.layers is not None for model in family.models))


def generic(folder: Path = FOLDER) -> Family:
    """Return the family with the facts that hold for every model unless its own table says something else."""
    return family_named(GENERIC, folder)


@cache
def family_named(name: str, folder: Path = FOLDER) -> Family:
    """Return the entries of the file `name`, followed by those of the families in its ``like``.

    Raises:
        LoratoolError: the file cannot be read, or ``like`` names a missing family or itself.
    """
    return _read(name, folder, ())


@cache
def _read(name: str, folder: Path, before: tuple[str, ...]) -> Family:
    file = folder / f"{name}.json"
    text = _text(name, folder)
    try:
        content = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise LoratoolError(f"{quoted(file)} is not a table in JSON ({error}); fix it") from None
    if not isinstance(content, dict):
        raise LoratoolError(f"{quoted(file)} is JSON and not an object; fix it")
    family = parse_family(content, name, str(file))
    for other in family.like:
        if other in (name, *before) or other not in _names(folder):
            reason = "is like itself" if other in (name, *before) else "does not exist"
            raise LoratoolError(f"'like' in {quoted(file)} names {quoted(other)}, which {reason}; fix it")
        family = family.followed_by(_read(other, folder, (name, *before)))
    return family


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key occurs twice")
    return content


@cache
def _names(folder: Path) -> tuple[str, ...]:
    """Return the names of the files without their suffix, sorted."""
    return tuple(sorted(name.removesuffix(".json") for name in os.listdir(folder) if name.endswith(".json")))


@cache
def _text(name: str, folder: Path) -> str:
    file = folder / f"{name}.json"
    try:
        with open(file, "rb") as stream:
            content = stream.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise LoratoolError(f"{quoted(file)} has more than {LARGEST} bytes; divide it")
        return content.decode()
    except OSError as error:
        raise LoratoolError(f"cannot read {quoted(file)}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise LoratoolError(f"{quoted(file)} is not text in UTF-8; fix it") from None
