"""Row blocks: the unit in which a matrix is read, changed and written, so that memory does not grow with the model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

from loratool.errors import CheckpointError, OutputError

BLOCK_ROWS: Final = 64
"""Blocks begin at multiples of this many rows, and a block has at least this many rows unless the matrix has fewer.

A BLAS adds up the product of a few rows in a different order than that of a whole matrix. With blocks of at least 64
rows, the product of a block equals those rows of the whole product bit for bit: with MKL, at every rank and shape tried
(tests/test_merge_equals_peft.py).
"""

BLOCK_BYTES: Final = 1 << 22
"""Approximate size of a block in fp32, in bytes: it fits in a cache, and hides Python's overhead for each block."""

WRITE_BYTES: Final = 1 << 19
"""Largest single write, in bytes. The kernel looks for contiguous memory for each write, which is slow for large ones."""


def row_blocks(rows: int, row_bytes: int, block_bytes: int = BLOCK_BYTES, least: int = BLOCK_ROWS) -> Iterator[range]:
    """Cut ``range(rows)`` into blocks of about `block_bytes` bytes, of `least` rows or a multiple of that.

    The remaining rows join the last block.
    """
    step = max(least, block_bytes // max(row_bytes, 1) // least * least)
    start = 0
    while rows - start >= step + least:
        yield range(start, start + step)
        start += step
    if start < rows:
        yield range(start, rows)


def read_exactly(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` from byte `offset` of the open file `fd`.

    Raises:
        CheckpointError: the file ends before the buffer is full.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            raise CheckpointError("a file of the model became shorter while it was read; run the command again")
        done += count


def write_exactly(fd: int, buffer: memoryview | bytes, offset: int) -> None:
    """Write all of `buffer` at byte `offset` of the open file `fd`.

    Raises:
        OutputError: the disk is full or fails.
    """
    view = memoryview(buffer)
    done = 0
    while done < len(view):
        try:
            done += os.pwrite(fd, view[done : done + WRITE_BYTES], offset + done)
        except OSError as error:
            raise out_of_room(error) from None


def out_of_room(error: OSError) -> OutputError:
    """Return the error for a failed write of the output."""
    return OutputError(f"cannot write the output: {error.strerror}; free some space and run again")


def read_columns(fd: int, buffer: memoryview, offset: int, row_bytes: int, part: slice) -> None:
    """Fill `buffer` with the byte range `part` of every row of a matrix that begins at byte `offset` of `fd`."""
    width = part.stop - part.start
    for row in range(len(buffer) // width):
        read_exactly(fd, buffer[row * width : (row + 1) * width], offset + row * row_bytes + part.start)


def write_columns(fd: int, buffer: memoryview, offset: int, row_bytes: int, part: slice) -> None:
    """Write `buffer` into the byte range `part` of every row of a matrix that begins at byte `offset` of `fd`."""
    width = part.stop - part.start
    for row in range(len(buffer) // width):
        write_exactly(fd, buffer[row * width : (row + 1) * width], offset + row * row_bytes + part.start)
