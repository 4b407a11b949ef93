"""The name that an adapter or a base gets in the catalogue where the user gives none: by its file, a folder above, or its base.

Programs save adapters under names that say nothing (``checkpoint-500``, ``adapter_model.safetensors``, a commit's hash). What
tells such an adapter from others is the folder above, or the repository that a folder of the Hub's cache is of.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from loratool.errors import AdapterError, quoted
from loratool.library.user_path import user_path
from registry import is_name
from registry.names import LONGEST_NAME

_GENERIC: Final = """
    adapter adapters model models pytorch peft lora loras weights checkpoint checkpoints ckpt ckpts global step steps epoch epochs
    iter iters iteration iterations final last latest best default output outputs out result results trained training saved
    export exported new untitled tmp temp download downloads main snapshot snapshots of v unet text encoder transformer prior
"""
GENERIC: Final = frozenset(_GENERIC.split())
"""Words that name no adapter, nor does a name that is made of them and numbers alone."""

_SHELVES: Final = """
    home users root tmp temp var mnt media volumes opt srv data desktop documents content kaggle workspace workspaces work
    project projects experiments runs hub blobs huggingface .cache cache
"""
SHELVES: Final = frozenset(_SHELVES.split())
"""Folders where people keep things of every kind: neither their names nor those above them say anything of an adapter."""

HIGHEST: Final = 5
"""How many folders above a file are looked at."""

_HASH: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_REPOSITORY: Final = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")


def name_from(stem: str) -> str:
    """A name that the catalogue takes, made from any text.

    Raises:
        AdapterError: nothing of it is left.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:LONGEST_NAME]
    if not is_name(name):
        raise AdapterError(f"no name can be made from {quoted(stem)}; give one with --name")
    return name


def is_generic(stem: str) -> bool:
    """Whether a file's or folder's name says nothing of what is in it: ``checkpoint-500``, ``final``, a commit's hash."""
    words = [word for word in re.split(r"[^a-z]+", stem.casefold()) if word]
    return _HASH.fullmatch(stem) is not None or (
        stem.isascii() and all(word in GENERIC for word in words) and any(map(str.isalnum, stem))
    )


def telling_name(stem: str, place: Path) -> str | None:
    """The name of what lies at `place` and is called `stem`: its own, or that of the nearest folder above that has a telling one.

    In the Hub's cache it is the repository's. None where no name says anything.
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
    """The name of what lies at `steps` in a repository: the last that says something, or the repository's."""
    owner, _, name = repo.partition("/")
    return next((step for step in reversed(steps) if not is_generic(step)), None) or _of_repository(owner, name)


def name_by_base(stem: str, base: str | None, kind: str) -> str:
    """A name for an adapter that no folder names, by its base, a catalogued name, path or Hub id, and its kind: ``llama-lora``.

    Raises:
        AdapterError: its base is not known, or is called nothing either.
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
    """The folder at `place`, or that of a file there, and those above it, as far as they are looked at; never the root."""
    path = Path(os.path.abspath(place))
    folders = [path, *path.parents] if path.is_dir() else [*path.parents]
    return (folder for folder in folders[:HIGHEST] if folder.name)


def _homes() -> set[Path]:
    """Folders whose names are a user's or a system's."""
    return {user_path("~"), Path(tempfile.gettempdir())}
