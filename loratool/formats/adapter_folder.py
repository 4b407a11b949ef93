"""The folder of an adapter, as training programs write it; a single file among others has none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from loratool.checkpoint.file_role import FileRole, role_of
from loratool.formats.adapter_names import CONFIG_NAME, MODEL_CONFIG, NAMES_IN_FOLDERS
from loratool.formats.identity import AnyAdapter
from loratool.formats.tokenizer import TokenizerFiles

PLAIN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,150}")
"""File names that every file system accepts."""


def folder_of(adapter: AnyAdapter) -> Path | None:
    """Return the folder that contains only this adapter's files; None for a single file or one in a model's folder."""
    folder = adapter.file.parent
    if adapter.file.name not in NAMES_IN_FOLDERS and not (folder / CONFIG_NAME).is_file():
        return None
    is_model = (folder / MODEL_CONFIG).exists() and any(
        role_of(file.name) is FileRole.MODEL_WEIGHTS for file in folder.iterdir()
    )
    return None if is_model else folder


def tokenizer_files(adapter: AnyAdapter) -> dict[str, Path]:
    """Return the files of the tokenizer beside an adapter, by name; empty if there are none."""
    folder = folder_of(adapter)
    names = () if folder is None else TokenizerFiles.of(folder).names
    return {name: adapter.file.parent / name for name in names if PLAIN.fullmatch(name)}
