"""What a user's word can be: a path, or the id of a repository on the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from loratool.errors import NotFoundError, quoted
from loratool.formats.adapter_names import SINGLE_FILE_SUFFIXES

HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def user_path(text: str | os.PathLike[str]) -> Path:
    """Return the path that a user means, with a leading ``~`` or ``~name`` replaced by that user's home.

    Raises:
        NotFoundError: there is no such user, and nothing of that name.
    """
    path = Path(text)
    try:
        return path.expanduser()
    except RuntimeError:
        if exists(path):
            return path
        raise NotFoundError(
            f"{quoted(path)} leads nowhere, because there is no user {quoted(path.parts[0][1:])} with a home; check the name, or "
            f"give {quoted(f'./{path}')} for a file of that name"
        ) from None


def exists(path: Path) -> bool:
    """Whether something is at `path`; a name that no file can have (too long, a zero byte) has nothing."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_plainly_a_path(text: str) -> bool:
    """Whether a name can be nothing but a path, by how it begins or ends."""
    return text.startswith((".", "/", "~")) or Path(text).suffix in SINGLE_FILE_SUFFIXES
