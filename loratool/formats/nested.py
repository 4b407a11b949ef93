"""Folders that are not adapters themselves: what they contain, and which of their subfolders are adapters."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from loratool.checkpoint.model import is_file
from loratool.errors import AdapterError, ElsewhereError, quoted
from loratool.formats.adapter_names import CONFIG_NAME, WEIGHTS_NAME, choose_weights, natural, shards_in, single_files

DEEPEST: Final = 3
MOST_ENTRIES: Final = 2_000
"""Depth of the search for adapters below a folder."""

SHOWN: Final = 5


def no_adapter_in(folder: Path, names: Sequence[str], *, is_model: bool) -> AdapterError:
    """Return the error for a folder that is not an adapter: why, and what to give instead. `names` are its files."""
    inside = nested_adapters(folder)
    if inside:
        which = "the folder" if len(inside) == 1 else "the folders"
        does = "does" if len(inside) == 1 else "do"
        return ElsewhereError(
            f"{quoted(folder)} holds no adapter itself, but {which} {listed(inside)} in it {does}; give "
            f"{'that folder' if len(inside) == 1 else 'one of them'}",
            folder,
            [folder / name for name in inside],
        )
    if is_model:
        return AdapterError(f"{quoted(folder)} is a whole model and no adapter; catalogue it with 'loratool base add'")
    shards = shards_in(names)
    if shards:
        return AdapterError(
            f"{quoted(folder)} holds {len(shards)} shards ({quoted(shards[0])}, ...) and no index of them; get their "
            "...safetensors.index.json from where they are from"
        )
    singles = single_files(names)
    if singles:
        return ElsewhereError(
            f"{quoted(folder)} holds several files that may be adapters ({listed(singles)}); give one of them",
            folder,
            [folder / name for name in singles],
        )
    return AdapterError(
        f"{quoted(folder)} holds no adapter: there is no {WEIGHTS_NAME} with its {CONFIG_NAME}, nor another safetensors or "
        "GGUF file; give the folder or file of an adapter"
    )


def nested_adapters(folder: Path) -> list[str]:
    """Return the folders below `folder` that contain an adapter, relative to it, in natural order, down to a limited depth."""
    return natural(str(found.relative_to(folder)) for found in _walk(folder, DEEPEST, [MOST_ENTRIES]))


def listed(names: Sequence[str]) -> str:
    """Return ``'a', 'b' and 'c'``, or the first names and the number of the others."""
    shown = [quoted(name, 60) for name in names[:SHOWN]]
    more = len(names) - len(shown)
    last = f"{more} more" if more else shown.pop()
    return f"{', '.join(shown)} and {last}" if shown else last


def _walk(folder: Path, depth: int, left: list[int]) -> Iterator[Path]:
    if not depth:
        return
    for entry in _entries(folder, left):
        if entry.name.startswith(".") or not entry.is_dir(follow_symlinks=False):
            continue
        names = [each.name for each in _entries(Path(entry.path), left) if is_file(each)]
        if choose_weights(names) is not None:
            yield Path(entry.path)
        else:
            yield from _walk(Path(entry.path), depth - 1, left)


def _entries(folder: Path, left: list[int]) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, limited by the number of entries `left` to visit."""
    found: list[os.DirEntry[str]] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not left[0]:
                    break
                left[0] -= 1
                found.append(entry)
    except OSError:
        return []
    return found
