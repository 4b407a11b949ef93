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
"""What is written past the page cache begins and ends at a multiple of this, in the file and in memory (open(2), O_DIRECT)."""

SLACK_BYTES: Final = 2 * PAGE_BYTES


def open_direct(file: Path) -> int | None:
    """`file` open for writing past the page cache; None where the file system cannot (tmpfs, some network ones)."""
    try:
        return os.open(file, os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW)
    except (OSError, AttributeError):
        return None


def skip_to_lie_as_at(buffer: torch.Tensor, offset: int) -> int:
    """How far into a CPU `buffer`, uint8, bytes lie in a page of memory as those from `offset` do in a page of a file.

    The beginning of that page is in the buffer as well, and the buffer must be longer than the bytes by `SLACK_BYTES`. At an
    offset that no element of a tensor could lie at it is 0.
    """
    return -buffer.data_ptr() % PAGE_BYTES + offset % PAGE_BYTES if offset % 8 == 0 else 0


class TensorWriter:
    """Writes the bytes of one tensor, block after block in their order, to the open file `fd`.

    Where `direct` is the same file open for writing past the page cache, whole pages go there. A page that a block begins
    and the next one ends waits for that; what the tensor has of its first and its last page goes to `fd`. So no page is
    written both ways.
    """

    def __init__(self, fd: int, direct: int | None) -> None:
        self._fd, self._direct = fd, direct
        self._begun, self._at = b"", 0

    def write(self, buffer: memoryview, block: slice, offset: int) -> None:
        """Write `block` of `buffer` at byte `offset`; what lies before the block in its page of memory is overwritten.

        Raises:
            OutputError: the disk takes no more.
        """
        if self._direct is None:
            write_exactly(self._fd, buffer[block], offset)
            return
        start = block.start - len(self._begun)
        buffer[start : block.start] = self._begun
        view, at = buffer[start : block.stop], offset - len(self._begun)
        first, last = -at % PAGE_BYTES, len(view) - (at + len(view)) % PAGE_BYTES
        if first >= last or (_address(view) + first) % PAGE_BYTES:
            first = last = len(view)
        write_exactly(self._fd, view[:first], at)
        self._write_pages(self._direct, view[first:last], at + first)
        self._begun, self._at = bytes(view[last:]), at + last

    def close(self) -> None:
        """Write what is left when the tensor's last block is written."""
        write_exactly(self._fd, self._begun, self._at)

    def _write_pages(self, direct: int, pages: memoryview, offset: int) -> None:
        done = 0
        try:
            while done < len(pages):
                done += os.pwrite(direct, pages[done:], offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL:  # the disk wants to have it otherwise than in pages of this size
                raise out_of_room(error) from None
            write_exactly(self._fd, pages[done:], offset + done)


def _address(view: memoryview) -> int:
    """Where in memory a view begins that is not empty."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
