"""What a user's word can be: a path, or the id of a repository on the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from loratool.formats.adapter_names import SINGLE_FILE_SUFFIXES

HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def user_path(text: str | os.PathLike[str]) -> Path:
    """The path that a user means, with a leading ``~`` or ``~name`` replaced where there is such a home."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def exists(path: Path) -> bool:
    """Whether something is at `path`; a name that no file can have (too long, a zero byte) has nothing."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_plainly_a_path(text: str) -> bool:
    """Whether a name can be nothing but a path, by how it begins or ends."""
    return text.startswith((".", "/", "~")) or Path(text).suffix in SINGLE_FILE_SUFFIXES
