"""Waiting for the write lock of a SQLite file, and the process that holds it, from Linux's list of locks."""

from __future__ import annotations

import os
import time
from pathlib import Path

from registry.names import printable

_LOCKS = Path("/proc/locks")
_WRITER = 120
"""The byte of the `-shm` file that the writer of a database with a write-ahead log locks (SQLite's WAL_WRITE_LOCK)."""

PAUSE_SECONDS = 0.1
"""Between two tries to take the lock. A program that looks for signals more often than that finds one in a pause."""


def pause(seconds: float) -> None:
    """Wait before the next try, with nothing begun and no lock taken: here, and here alone, a writer may be interrupted."""
    time.sleep(seconds)


def holder(file: Path | None) -> str:
    """Return who writes to the SQLite file now: `process 1234 (loratool merge)`, or `another process` if unknown.

    The kernel's list of locks is read, since opening and closing the file itself would drop this process's own locks.
    """
    process = None if file is None else _writer(file)
    if process is None:
        return "another process"
    name = _command(process)
    return f"process {process} ({name})" if name else f"process {process}"


def _writer(file: Path) -> int | None:
    """Return the process with the write lock, which is on the log's index, or without a log, on the file itself."""
    whole, index = _inode(file), _inode(file.with_name(f"{file.name}-shm"))
    try:
        lines = _LOCKS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        # 1: POSIX  ADVISORY  WRITE 1234 08:01:123456 120 120
        words = line.split()
        if len(words) != 8 or words[1] not in ("POSIX", "OFDLCK") or words[3] != "WRITE":
            continue
        process, inode = int(words[4]), int(words[5].rpartition(":")[2])
        last = _WRITER if words[7] == "EOF" else int(words[7])
        holds = inode == whole or (inode == index and int(words[6]) <= _WRITER <= last)
        if holds and process not in (os.getpid(), 0, -1):
            return process
    return None


def _inode(file: Path) -> int | None:
    try:
        return file.stat().st_ino
    except OSError:
        return None


def _command(process: int) -> str:
    """Return the program and its first argument, such as `loratool merge`; empty if unknown."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    shown = [Path(word).name for word in words if word and not word.startswith("-")]
    if len(shown) > 1 and shown[0].startswith("python"):
        shown = shown[1:]
    return printable(" ".join(shown[:2]), 60)
