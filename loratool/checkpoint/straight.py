"""Writing past the page cache, straight to the disk.

A merged model is written once, made durable, and read again later if at all. To find memory for its pages, copy the bytes
there and send them on takes the kernel longer than the arithmetic of a merge; and it would drive the base's pages out.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loratool.checkpoint.blocks import out_of_room, write_exactly

if TYPE_CHECKING:
    import torch

PAGE_BYTES: Final = 4096
"""What is written straight begins and ends at a multiple of this, in the file and in memory (open(2), O_DIRECT)."""


def open_straight(file: Path) -> int | None:
    """`file` open for writing past the page cache; None where the file system cannot (tmpfs, some network ones)."""
    try:
        return os.open(file, os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW)
    except (OSError, AttributeError):
        return None


def lying_as_at(buffer: torch.Tensor, nbytes: int, offset: int) -> torch.Tensor:
    """`nbytes` of a CPU `buffer`, uint8, that lie in their page of memory as the bytes from `offset` do in a file's.

    `buffer` is longer by a page. At an offset that no element of a tensor could lie at, they are simply its first.
    """
    skip = (offset - buffer.data_ptr()) % PAGE_BYTES
    return buffer[skip : skip + nbytes] if skip % 8 == 0 else buffer[:nbytes]


def write_straight(straight: int, fd: int, view: memoryview, offset: int) -> None:
    """Write all of `view` at byte `offset`: whole pages to `straight`, what is left over at both ends to `fd`.

    Both are the same file. No page of it is written both ways, so it does not matter which way is done first.

    Raises:
        OutputError: the disk takes no more.
    """
    address = ctypes.addressof(ctypes.c_char.from_buffer(view)) if len(view) else 0
    begin, end = -offset % PAGE_BYTES, len(view) - (offset + len(view)) % PAGE_BYTES
    if begin >= end or (address + begin) % PAGE_BYTES:
        write_exactly(fd, view, offset)
        return
    done = begin
    try:
        while done < end:
            done += os.pwrite(straight, view[done:end], offset + done)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the disk wants to have it otherwise than in pages of this size
            raise out_of_room(error) from None
        end = done
    write_exactly(fd, view[:begin], offset)
    write_exactly(fd, view[end:], offset + end)
