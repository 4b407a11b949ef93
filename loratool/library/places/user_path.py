"""Interpretation of a user's argument as a path, or as the id of a repository on the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from loratool.errors import HubUnreachableError, NotFoundError, quoted
from loratool.formats.adapter_names import SINGLE_FILE_SUFFIXES

HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def user_path(text: str | os.PathLike[str]) -> Path:
    """Return the user's path, with a leading ``~`` or ``~name`` replaced by the home folder.

    Raises:
        NotFoundError: there is no such user, and no file of that name.
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
    """Return whether `path` exists; False for impossible names (too long, with a zero byte)."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


@contextmanager
def taken_for_hub_id(text: str) -> Iterator[None]:
    """Block in which `text` is looked up on the Hub. If the Hub cannot be reached, the error adds that `text` is not a path.

    Raises:
        HubUnreachableError: the Hub cannot be reached.
    """
    try:
        yield
    except HubUnreachableError as error:
        raise HubUnreachableError(
            f"{quoted(text)} is not a file or folder here, so it was taken for a Hub id, and {error}"
        ) from None


def is_plainly_a_path(text: str) -> bool:
    """Return whether a name can only be a path, by its beginning or suffix."""
    return text.startswith((".", "/", "~")) or Path(text).suffix in SINGLE_FILE_SUFFIXES
