"""A copy of a model's files in which space is left for the tensors that change. The kernel copies the rest."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from loratool.checkpoint.copying import begin_to_write, copy_range
from loratool.checkpoint.direct_io import open_direct
from loratool.checkpoint.header import Header
from loratool.checkpoint.model import Checkpoint

PIECE_BYTES: Final = 1 << 26
"""Size of the pieces in which ranges are copied, in bytes, so that workers share the copying evenly."""


@dataclass(frozen=True, slots=True)
class ModelCopy:
    """The new weight files by the path of their original, open for writing, and the jobs that copy the rest.

    `direct` holds the same files, open for writing past the page cache, where the file system supports it.
    """

    files: dict[Path, int]
    direct: dict[Path, int]
    copies: list[Callable[[], None]]


@contextmanager
def model_copy(checkpoint: Checkpoint, folder: Path, changing: Collection[str], others: Collection[Path],
               progress: Callable[[int], None]) -> Iterator[ModelCopy]:  # fmt: skip
    """Create the weight files of `checkpoint` in the empty `folder`, without the bytes of `changing` tensors.

    `others` are further files to copy, as paths relative to the model's folder.
    """
    with ExitStack() as stack:
        files: dict[Path, int] = {}
        copies: list[Callable[[], None]] = []
        direct: dict[Path, int] = {}
        for header in checkpoint.headers:
            source = os.open(header.file, os.O_RDONLY)
            stack.callback(os.close, source)
            target = os.open(folder / header.file.name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            stack.callback(os.close, target)
            os.truncate(target, header.size)
            for start, stop in _changing_ranges(header, changing):
                os.posix_fallocate(target, start, stop - start)
            files[header.file] = target
            past_cache = open_direct(folder / header.file.name)
            if past_cache is not None:
                stack.callback(os.close, past_cache)
                direct[header.file] = past_cache
            copies += [
                partial(_copy, source, target, start, stop, progress) for start, stop in _kept_pieces(header, changing)
            ]
        copies += [partial(copy_file, checkpoint.folder / name, folder / name) for name in sorted(others)]
        yield ModelCopy(files, direct, copies)


def _copy(source: int, target: int, start: int, stop: int, progress: Callable[[int], None]) -> None:
    copy_range(source, target, start, stop, progress=progress)
    begin_to_write(target, start, stop)


def _changing_ranges(header: Header, changing: Collection[str]) -> Iterator[tuple[int, int]]:
    """Yield the byte ranges of a file that hold changing tensors; adjacent ranges are joined."""
    ranges = sorted(
        (info.start, info.stop) for info in header.tensors.values() if info.name in changing and info.nbytes
    )
    while ranges:
        start, stop = ranges.pop(0)
        while ranges and ranges[0][0] == stop:
            _, stop = ranges.pop(0)
        yield start, stop


def _kept_pieces(header: Header, changing: Collection[str]) -> Iterator[tuple[int, int]]:
    """Yield, in pieces, the byte ranges of a file (header included) that hold no changing tensor."""
    start = 0
    for info in sorted(header.tensors.values(), key=lambda info: info.start):
        if info.name in changing:
            yield from pieces(start, info.start)
            start = info.stop
    yield from pieces(start, header.size)


def pieces(start: int, stop: int, size: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
    """Cut ``start:stop`` at multiples of `size` bytes."""
    while start < stop:
        end = min(stop, (start // size + 1) * size)
        yield start, end
        start = end


def copy_file(source: Path, target: Path) -> None:
    """Copy a file and its permissions to `target`, which must not exist; the copy is writable for its owner."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb") as reader, open(target, "xb") as writer:
        status = os.fstat(reader.fileno())
        copy_range(reader.fileno(), writer.fileno(), 0, status.st_size)
        os.fchmod(writer.fileno(), status.st_mode & 0o777 | 0o200)
