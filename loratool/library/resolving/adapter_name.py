"""Default names of adapters and bases in the catalogue: from the file, a folder above it, or the base.

Programs save adapters under generic names (``checkpoint-500``, ``adapter_model.safetensors``, a commit's hash). Such an adapter
is named after the folder above, or after the repository if it is in the Hub's cache.
"""

from __future__ import annotations

import os
import re
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from loratool.errors import AdapterError, quoted
from loratool.library.places.user_path import user_path
from registry import is_name
from registry.names import LONGEST_NAME

_GENERIC: Final = """
    adapter adapters model models pytorch peft lora loras weights checkpoint checkpoints ckpt ckpts global step steps epoch epochs
    iter iters iteration iterations final last latest best default output outputs out result results trained training saved
    export exported new untitled tmp temp download downloads main snapshot snapshots of v unet text encoder transformer prior
"""
GENERIC: Final = frozenset(_GENERIC.split())
"""Generic words. A name made only of these and of numbers is generic, too."""

_SHELVES: Final = """
    home users root tmp temp var mnt media volumes opt srv data desktop documents content kaggle workspace workspaces work
    project projects experiments runs hub blobs huggingface .cache cache
"""
SHELVES: Final = frozenset(_SHELVES.split())
"""Folders with mixed content. Their names, and those of the folders above them, do not describe an adapter."""

HIGHEST: Final = 5
"""Number of folders that are searched for a name."""

_HASH: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_REPOSITORY: Final = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")


_LETTERS: Final = str.maketrans({
    "ß": "ss", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "Đ": "D", "ð": "d",
    "Ð": "D", "þ": "th", "Þ": "Th", "ı": "i",
})  # fmt: skip
"""Latin letters that are no ASCII letters with an accent."""


def name_from(stem: str) -> str:
    """Turn any text into a name that the catalogue accepts. Latin letters lose their accents.

    Raises:
        AdapterError: the text has no usable characters.
    """
    plain = unicodedata.normalize("NFKD", stem.translate(_LETTERS))
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._")[:LONGEST_NAME]
    if not is_name(name):
        raise AdapterError(f"no name can be made from {quoted(stem)}; give one with --name")
    return name


def is_generic(stem: str) -> bool:
    """Return whether a file's or folder's name is generic, such as ``checkpoint-500``, ``final`` or a commit's hash."""
    words = [word for word in re.split(r"[^a-z]+", stem.casefold()) if word]
    return _HASH.fullmatch(stem) is not None or (
        stem.isascii() and all(word in GENERIC for word in words) and any(map(str.isalnum, stem))
    )


def specific_name(stem: str, place: Path) -> str | None:
    """Return a name for `place`: `stem`, or if that is generic the name of the nearest folder above that is not.

    In the Hub's cache the name is the repository's. None if all names are generic.
    """
    if not is_generic(stem):
        return stem
    for folder in _folders(place):
        repository = _REPOSITORY.fullmatch(folder.parent.parent.name) if folder.parent.name == "snapshots" else None
        if repository is not None:
            return _of_repository(repository["owner"], repository["name"])
        if folder.name.casefold() in SHELVES or folder in _homes() or folder.parent.name in ("home", "Users"):
            return None
        if not is_generic(folder.name):
            return folder.name
    return None


def name_on_hub(repo: str, steps: list[str]) -> str:
    """Return a name for the path `steps` in a repository: the last step that is not generic, or the repository's name."""
    owner, _, name = repo.partition("/")
    return next((step for step in reversed(steps) if not is_generic(step)), None) or _of_repository(owner, name)


def name_by_base(stem: str, base: str | None, kind: str) -> str:
    """Return a name made of the base and the kind of an adapter, such as ``llama-lora``, if no folder gives one.

    `base` is a catalogued name, path or Hub id.

    Raises:
        AdapterError: the base is unknown, or has a generic name, too.
    """
    word = Path(base).name if base else ""
    if not word or is_generic(word):
        raise AdapterError(
            f"{quoted(stem)} says nothing of what the adapter is, nor do the folders above it or its configuration; give it a "
            "name with --name"
        )
    return f"{word}-{kind}"


def _of_repository(owner: str, name: str) -> str:
    return f"{owner}-{name}" if is_generic(name) else name


def _folders(place: Path) -> Iterator[Path]:
    """Return the folders to search for a name, nearest first: the one at or around `place`, and those above but the root."""
    path = Path(os.path.abspath(place))
    folders = [path, *path.parents] if path.is_dir() else [*path.parents]
    return (folder for folder in folders[:HIGHEST] if folder.name)


def _homes() -> set[Path]:
    """Return folders that are named after a user or by the system."""
    return {user_path("~"), Path(tempfile.gettempdir())}
