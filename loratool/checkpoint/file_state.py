"""Whether a file is still the one that was read.

What is made of a file that another program replaces or writes meanwhile is of two files, and of neither. So the state of each
file is noted when it is opened, and compared when everything has been read and nothing has appeared yet.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from loratool.errors import CheckpointError, quoted


@dataclass(frozen=True, slots=True)
class FileState:
    """What changes when a file is replaced or written.

    Attributes:
        file: its path; a link is followed.
        device, inode: which file it is.
        size: in bytes.
        mtime_ns, ctime_ns: when its content, and when anything about it, was changed, in nanoseconds. A program can set the
            first and not the second: a file that is put in the place of another has another inode or a later ctime.
    """

    file: Path
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, file: Path, status: os.stat_result | None = None) -> Self:
        """Return the present state of `file`, or the one in its `status`.

        Raises:
            OSError: it is not there, or cannot be looked at.
        """
        found = file.stat() if status is None else status
        return cls(file, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def states_of(files: Iterable[Path]) -> tuple[FileState, ...]:
    """Return the present states of those `files` that are there."""
    found = []
    for file in files:
        with suppress(OSError):
            status = file.stat()
            if stat.S_ISREG(status.st_mode):
                found.append(FileState.of(file, status))
    return tuple(found)


def refuse_changed_meanwhile(states: Iterable[FileState]) -> None:
    """Check that every file is still as it was when its state was noted.

    Raises:
        CheckpointError: names the first that is not.
    """
    for state in states:
        try:
            changed = FileState.of(state.file) != state
        except OSError as error:
            raise CheckpointError(
                f"{quoted(state.file)} cannot be read any more ({error.strerror}); it was there when this run began, and nothing "
                "was written; run again when it is back"
            ) from None
        if changed:
            raise CheckpointError(
                f"{quoted(state.file)} was replaced or written while it was read, so nothing was made of it; run again when no "
                "other program changes it"
            )
