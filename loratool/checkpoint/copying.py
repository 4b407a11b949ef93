"""Copying of bytes between files inside the kernel: by shared extents where the file system supports them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import threading
from collections.abc import Callable, Collection, Iterator
from functools import cache
from typing import Final, cast

from loratool.errors import CheckpointError
from loratool.interrupts import check

FICLONERANGE: Final = 0x4020940D
"""Request of ioctl(2) that makes two files share a range of blocks (Linux, <linux/fs.h>)."""

CHUNK_BYTES: Final = 1 << 24
SYNC_FILE_RANGE_WRITE: Final = 2
"""Flag of sync_file_range(2): start to write dirty pages, without waiting for them (Linux)."""

FLUSH_SECONDS: Final = 0.05
"""Pause between two rounds of `flushing`, in seconds."""

_UNSUPPORTED: Final = {
    errno.EXDEV,
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTTY,
    errno.EBADF,
    errno.EPERM,
}


def copy_range(source: int, target: int, start: int, stop: int, *, at: int | None = None,
               progress: Callable[[int], None] = lambda count: None) -> None:  # fmt: skip
    """Copy bytes ``start:stop`` of the open file `source` to offset `at` (default `start`) of the open file `target`.

    The whole blocks inside the range are shared (a reflink) where possible; the rest goes by ``copy_file_range``, or by
    read and write. `progress` receives the number of bytes copied since its last call.

    Raises:
        CheckpointError: `source` ends before `stop`.
        OSError: the target cannot be written.
    """
    shift = (start if at is None else at) - start
    for begin, end in _share_blocks(source, target, start, stop, shift):
        _copy_in_kernel(source, target, begin, end, shift, progress)


def _share_blocks(source: int, target: int, start: int, stop: int, shift: int) -> list[tuple[int, int]]:
    """Reflink the aligned middle of the range; return the ranges that must still be copied."""
    block = os.fstat(target).st_blksize
    begin, end = -(-start // block) * block, stop // block * block
    if shift % block or end <= begin:
        return [(start, stop)]
    try:
        fcntl.ioctl(target, FICLONERANGE, struct.pack("qQQQ", source, begin, end - begin, begin + shift))
    except OSError:
        return [(start, stop)]
    return [(start, begin), (end, stop)]


def _copy_in_kernel(source: int, target: int, start: int, stop: int, shift: int,
                    progress: Callable[[int], None]) -> None:  # fmt: skip
    step = _copy_file_range
    while start < stop:
        check()
        try:
            count = step(source, target, min(CHUNK_BYTES, stop - start), start, start + shift)
        except OSError as error:
            if step is _copy_plainly or error.errno not in _UNSUPPORTED:
                raise
            step = _copy_plainly
            continue
        if count == 0:
            raise CheckpointError("a file of the model became shorter while it was copied; run the command again")
        start += count
        progress(count)


def _copy_file_range(source: int, target: int, count: int, start: int, at: int) -> int:
    return os.copy_file_range(source, target, count, start, at)


def _copy_plainly(source: int, target: int, count: int, start: int, at: int) -> int:
    return os.pwrite(target, os.pread(source, min(count, 1 << 20), start), at)


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return cast(Callable[[int, int, int, int], int], function)


def begin_to_write(fd: int, start: int = 0, stop: int = 0) -> None:
    """Start to write bytes ``start:stop`` of the open file `fd` (by default, all) to the disk, without waiting for them.

    A later fsync then waits less. Systems without sync_file_range(2) do nothing here. Disk errors are reported by fsync.
    """
    sync_file_range = _sync_file_range()
    if sync_file_range is not None:
        sync_file_range(fd, start, stop - start, SYNC_FILE_RANGE_WRITE)


@contextlib.contextmanager
def flushing(files: Collection[int]) -> Iterator[None]:
    """Run `begin_to_write` on the open `files` repeatedly, in a thread, until the block ends."""
    if not files:
        yield
        return
    done = threading.Event()

    def flush() -> None:
        while not done.wait(FLUSH_SECONDS):
            for fd in files:
                begin_to_write(fd)

    flusher = threading.Thread(target=flush)
    flusher.start()
    try:
        yield
    finally:
        done.set()
        flusher.join()


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make the names in `folder` durable by fsync of the directory, where the file system supports it."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)
