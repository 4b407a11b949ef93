"""Writing straight to the disk, past the page cache.

A merged model is written once and seldom read soon after. In the page cache its pages would evict the base's, and the kernel
would spend more time on allocating and copying them than the merge spends on arithmetic.
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
"""Alignment of direct writes, in bytes: of both their ends, in the file and in memory (open(2), O_DIRECT)."""

SLACK_BYTES: Final = 2 * PAGE_BYTES


def open_direct(file: Path) -> int | None:
    """Open `file` for writing past the page cache; return None where the file system does not support it (tmpfs)."""
    try:
        return os.open(file, os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW)
    except (OSError, AttributeError):
        return None


def skip_to_lie_as_at(buffer: torch.Tensor, offset: int) -> int:
    """Return where in `buffer` to put bytes for a file's `offset`, so that both have the same position in their page.

    `buffer` is a uint8 CPU tensor, longer than the bytes by `SLACK_BYTES`. The start of that page lies in it, too. At an
    offset where no element of a tensor can begin (not a multiple of 8), the result is 0.
    """
    return -buffer.data_ptr() % PAGE_BYTES + offset % PAGE_BYTES if offset % 8 == 0 else 0


class TensorWriter:
    """Writer of one tensor to the open file `fd`, block after block in order.

    `direct` is the same file, open for writing past the page cache, or None. Whole pages go to `direct`. A page that two
    blocks share is kept back until the second one is written. The tensor's parts of its first and last page go to `fd`, so
    that no page is written both ways.
    """

    def __init__(self, fd: int, direct: int | None) -> None:
        self._fd, self._direct = fd, direct
        self._begun, self._at = b"", 0

    def write(self, buffer: memoryview, block: slice, offset: int) -> None:
        """Write `block` of `buffer` at byte `offset` of the file. Bytes before the block in its page are overwritten.

        Raises:
            OutputError: the disk is full or fails.
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
        """Write the rest, after the tensor's last block."""
        write_exactly(self._fd, self._begun, self._at)

    def _write_pages(self, direct: int, pages: memoryview, offset: int) -> None:
        done = 0
        try:
            while done < len(pages):
                done += os.pwrite(direct, pages[done:], offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: the disk needs another alignment
                raise out_of_room(error) from None
            write_exactly(self._fd, pages[done:], offset + done)


def _address(view: memoryview) -> int:
    """Return the address in memory of a view that is not empty."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
