"""Small disks of their own, to be full or read-only for real; what needs one skips itself where nothing can be mounted."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str = "4m") -> Iterator[Path]:
    """A disk of that size in memory, at `folder`."""
    folder.mkdir(parents=True)
    if os.geteuid() != 0 or not _succeeds("mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(folder)):
        pytest.skip("needs root, who may mount a disk")
    try:
        yield folder
    finally:
        _succeeds("umount", "--lazy", str(folder))


def make_read_only(disk: Path) -> None:
    """From now on nothing on the disk can be changed, not by root either."""
    assert _succeeds("mount", "-o", "remount,ro", str(disk))


def fill(disk: Path) -> Path:
    """Write until the disk is full; the file that fills it."""
    file = disk / "filling"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with suppress(OSError):
        while True:
            os.write(descriptor, b"x" * 4096)
    os.close(descriptor)
    return file


def _succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
