"""Writing the tensors of one converted matrix to the new files, or only to digests."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from blake3 import blake3

from loratool.checkpoint.blocks import write_columns, write_exactly
from loratool.checkpoint.fingerprint import hash_range
from loratool.checkpoint.header import TensorInfo
from loratool.checkpoint.layout import Layout, NewFiles
from loratool.merging.stream import bytes_of

if TYPE_CHECKING:
    import torch


class ConvertedWriter:
    """Writes one matrix's tensors to their places and computes their digests.

    Without files it only computes digests. A tensor that is not written in byte order then goes to a temporary file first.
    """

    def __init__(self, layout: Layout, new: NewFiles | None) -> None:
        self._tensors, self._new = layout.tensors, new
        self._appended: dict[str, _Appended] = {}
        self._scattered: dict[str, tuple[int, int]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def info(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def append(self, name: str, part: torch.Tensor) -> None:
        """Write the next bytes of a tensor."""
        info, view = self._tensors[name], bytes_of(part)
        written = self._appended.setdefault(name, _Appended())
        if self._new is not None:
            write_exactly(self._new.files[info.file.name], view, info.start + written.nbytes)
        written.hasher.update(view)
        written.nbytes += len(view)

    def put_columns(self, name: str, part: torch.Tensor, row_bytes: int, columns: slice) -> None:
        """Write some columns of a tensor, given row by row; `columns` are their bytes within a row."""
        fd, start = self._scattered.get(name) or self._scatter(self._tensors[name])
        write_columns(fd, bytes_of(part), start, row_bytes, columns)

    def _scatter(self, info: TensorInfo) -> tuple[int, int]:
        """Return the open file that a tensor goes to, and its offset there."""
        if self._new is None:
            place = self._stack.enter_context(_temporary_file()).fileno(), 0
        else:
            place = self._new.files[info.file.name], info.start
        self._scattered[info.name] = place
        return place

    def digests(self) -> dict[str, str]:
        """Return the digest of every tensor, by name, once all are written."""
        appended = {name: str(written.hasher.hexdigest()) for name, written in self._appended.items()}
        return appended | {
            name: hash_range(fd, start, start + self._tensors[name].nbytes)
            for name, (fd, start) in self._scattered.items()
        }


def _temporary_file() -> BinaryIO:
    """Open a file without a name, which is deleted when closed."""
    return tempfile.TemporaryFile()


@dataclass(slots=True)
class _Appended:
    """Number of bytes of a tensor written, and its digest so far."""

    nbytes: int = 0
    hasher: Any = field(default_factory=blake3)
