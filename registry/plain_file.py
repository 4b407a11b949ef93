"""Reading of small files from a place where anything may be: never through a link, never from a pipe, never without end."""

from __future__ import annotations

import os
import stat
from pathlib import Path


class UnreadableFileError(ValueError):
    """A file cannot be read; the message says why, and begins with 'it'."""


def open_plain(path: Path) -> int:
    """Return a descriptor of a regular file, opened without waiting for anybody and without following a link.

    Raises:
        OSError: it cannot be opened.
        UnreadableFileError: it is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnreadableFileError("it is not a regular file")
    return descriptor


def read_plain(path: Path, largest: int) -> bytes | None:
    """Return the content of a regular file, cut one byte after `largest`; None if there is none.

    Raises:
        UnreadableFileError: it is not a regular file, or cannot be read.
    """
    try:
        with os.fdopen(open_plain(path), "rb") as file:
            return file.read(largest + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnreadableFileError(f"it cannot be read ({error.strerror})") from None


def is_plain(path: Path) -> bool:
    """Whether there is a regular file at `path`, and no link."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False
