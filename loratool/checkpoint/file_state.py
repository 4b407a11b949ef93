"""States of files, to detect that another program changed a file while it was read.

An output that is made from such a file would mix the old and the new content. So the state of each file is recorded when it is
opened, and compared after everything is read and before the output appears.
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
    """Facts about a file that change when it is replaced or written.

    Attributes:
        file: its path; a link is followed.
        device, inode: identity of the file.
        size: in bytes.
        mtime_ns: time of the last change of its content, in nanoseconds. A program can set it.
        ctime_ns: time of the last change of its content or attributes, in nanoseconds. A program cannot set it, so a
            file that replaces another has a different inode or a later ctime.
    """

    file: Path
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, file: Path, status: os.stat_result | None = None) -> Self:
        """Return the current state of `file`, or the state in `status` if given.

        Raises:
            OSError: the file does not exist, or cannot be accessed.
        """
        found = file.stat() if status is None else status
        return cls(file, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def states_of(files: Iterable[Path]) -> tuple[FileState, ...]:
    """Return the current states of those `files` that exist."""
    found = []
    for file in files:
        with suppress(OSError):
            status = file.stat()
            if stat.S_ISREG(status.st_mode):
                found.append(FileState.of(file, status))
    return tuple(found)


def refuse_changed_meanwhile(states: Iterable[FileState]) -> None:
    """Check that no file changed since its state was recorded.

    Raises:
        CheckpointError: a file did, or cannot be read; the message names the first.
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
