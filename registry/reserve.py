"""A file that reserves half a megabyte of the home's disk for the case that the disk is full.

SQLite writes to its log even to delete a row, so nothing could be removed on a full disk. The reserve is deleted when the
catalogue is opened for writing on a full disk, and made again when it is closed and there is space.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

RESERVE_NAME = "registry.reserve"
RESERVE_BYTES = 1 << 19
LEAST_BYTES = 1 << 17
"""Bytes that SQLite needs to start writing: the index of its log, and some pages."""


def free_bytes(folder: Path) -> int | None:
    """Return the bytes that this user can still write on the disk of `folder`; None if unknown."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return None
    blocks = disk.f_bfree if os.geteuid() == 0 else disk.f_bavail
    return blocks * disk.f_frsize


def is_full(folder: Path) -> bool:
    """Whether less space is free than SQLite needs to start writing."""
    free = free_bytes(folder)
    return free is not None and free < LEAST_BYTES


def give_up(home: Path) -> None:
    """Delete the reserve if the disk is full."""
    free = free_bytes(home)
    if free is not None and free < RESERVE_BYTES:
        with suppress(OSError):
            (home / RESERVE_NAME).unlink()


def keep(home: Path) -> None:
    """Make the reserve if it is missing, or a smaller one if the disk is nearly full."""
    file = home / RESERVE_NAME
    size = min(free_bytes(home) or 0, RESERVE_BYTES)
    if size < LEAST_BYTES:
        return
    with suppress(OSError):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError:
            file.unlink()
        finally:
            os.close(descriptor)
