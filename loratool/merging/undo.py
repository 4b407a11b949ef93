"""The undo file: what arithmetic cannot restore of every matrix that a merge changed.

It is a safetensors file with one uint8 tensor for each matrix, under the matrix's own name: a sequence of frames, each
three little-endian uint32 (first row, row after the last, bytes that follow) and the residual of those rows
(`loratool.merging.residual`). The adapters are kept beside it, so that undoing a merge needs nothing else.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from loratool.checkpoint.copying import copy_range
from loratool.checkpoint.header import TensorInfo, header_bytes, read_header
from loratool.errors import CheckpointError, OutputError, RestoreError, quoted
from loratool.merging.plan import Target

UNDO_NAME: Final = "undo.st"
FORMAT: Final = {"format": "loratool-undo-1"}
_FRAME: Final = struct.Struct("<III")


def adapter_file(index: int) -> str:
    """Return the file name, in an undo folder, of the adapter at position `index` of the merge."""
    return f"adapter-{index}.st"


class UndoWriter:
    """Collects the residuals of many matrices, from several threads, and writes them as one file.

    Frames are first appended to a scratch file beside `file`. Closing sorts them by name and row, so that equal merges give
    equal bytes, and removes the scratch file.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._scratch = file.with_suffix(".scratch")
        self._lock = threading.Lock()
        self._frames: dict[str, list[tuple[int, int, int]]] = {}
        self._size = 0
        self._fd = -1

    def __enter__(self) -> Self:
        self._fd = os.open(self._scratch, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._assemble()
        finally:
            os.close(self._fd)
            self._scratch.unlink(missing_ok=True)

    def keeper(self, name: str) -> Callable[[range, bytes], None]:
        """Return a function that stores the residual of some rows of the matrix `name`."""
        return partial(self._keep, name)

    def _keep(self, name: str, rows: range, packed: bytes) -> None:
        frame = _FRAME.pack(rows.start, rows.stop, len(packed)) + packed
        with self._lock:
            at, self._size = self._size, self._size + len(frame)
            self._frames.setdefault(name, []).append((rows.start, at, len(frame)))
        done = 0
        while done < len(frame):
            try:
                done += os.pwrite(self._fd, frame[done:], at + done)
            except OSError as error:
                raise OutputError(f"cannot write the undo file: {error.strerror}; free some space") from None

    def _assemble(self) -> None:
        sizes = {name: sum(length for _, _, length in frames) for name, frames in sorted(self._frames.items())}
        head = header_bytes({name: ("U8", (size,)) for name, size in sizes.items()}, FORMAT)
        with open(self.file, "wb") as target:
            target.write(head)
            target.flush()
            offset = len(head)
            for name in sizes:
                for _, at, length in sorted(self._frames[name]):
                    copy_range(self._fd, target.fileno(), at, at + length, at=offset)
                    offset += length


class UndoFile:
    """An undo file, checked against the matrices to restore.

    Raises:
        RestoreError: it is damaged, or belongs to other matrices.
    """

    def __init__(self, file: Path, targets: tuple[Target, ...]) -> None:
        try:
            header = read_header(file)
        except CheckpointError as error:
            raise RestoreError(str(error)) from None
        if dict(header.metadata) != FORMAT or set(header.tensors) != {target.name for target in targets}:
            raise RestoreError(f"{quoted(file)} is not the undo file of this merge; unmerge from the base instead")
        self.size = header.size
        self._file = file
        self._tensors = header.tensors

    def frames(self, target: Target) -> Iterator[tuple[range, bytes]]:
        """Yield the blocks of rows of `target`'s matrix, in order, with their residuals."""
        info: TensorInfo = self._tensors[target.name]
        rows, columns = target.weight.rows, target.weight.columns
        largest = 64 + 16 * 4 * max(columns, 1) * max(rows, 1)
        expected = 0
        with open(self._file, "rb") as stream:
            stream.seek(info.start)
            while stream.tell() < info.stop:
                head = stream.read(_FRAME.size)
                if len(head) < _FRAME.size:
                    raise self._damaged(target)
                first, last, length = _FRAME.unpack(head)
                room = info.stop - stream.tell()
                if first != expected or not first < last <= rows or length > min(room, largest):
                    raise self._damaged(target)
                yield range(first, last), stream.read(length)
                expected = last
        if expected != rows:
            raise self._damaged(target)

    def _damaged(self, target: Target) -> RestoreError:
        return RestoreError(
            f"{quoted(self._file)} is damaged at the entry for {quoted(target.name)}; unmerge from the base instead"
        )
