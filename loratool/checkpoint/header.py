"""Headers of safetensors files, read and checked by the rules of the format. No tensor data is read.

The format (https://github.com/huggingface/safetensors#format) has the length of the header as eight little-endian bytes,
the header in JSON, then the tensors' bytes without holes or overlaps.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final

from loratool.checkpoint.dtypes import DTYPES
from loratool.checkpoint.file_state import FileState
from loratool.checkpoint.file_type import LOOKED_AT, type_by_content
from loratool.checkpoint.json_text import broken_file, open_without_waiting, parse_json_object
from loratool.errors import CheckpointError, quoted, to_paste

MAX_HEADER_BYTES: Final = 100_000_000
"""The format's own limit on the length of the JSON header."""

SEAL: Final = b"\xff" * 8
"""First bytes of a file that loratool is changing, in place of its header's length (`loratool.checkpoint.seal`)."""

JOURNAL: Final = ".loratool-journal"
"""Folder in a model, from which an interrupted change in place is finished (`loratool.checkpoint.journal`)."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Name, dtype, shape and place of one tensor, whose bytes are ``file[start:stop]``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the stored tensor. The last dimension gives the columns; a vector is one row."""
        return math.prod(self.shape[:-1]), self.shape[-1] if self.shape else 1


@dataclass(frozen=True, slots=True)
class Header:
    """The checked header of one safetensors file of `size` bytes, whose tensor data begins at byte `data_start`.

    `state` is the file's state when its header was read; None if the file is not on this machine.
    """

    file: Path
    size: int
    data_start: int
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    state: FileState | None = None


def read_header(file: Path) -> Header:
    """Read and check the header of the safetensors file `file`.

    Raises:
        CheckpointError: the file is missing, is not a regular file, or breaks a rule of the format: length, JSON,
            duplicate keys, dtype, shape, offsets, overlaps, holes, or a size that differs from what its header says.
    """
    try:
        with open(file, "rb", opener=open_without_waiting) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{quoted(file)} is not a regular file")
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if prefix == SEAL:
                raise _sealed(file)
            if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, status.st_size - 8):
                _refuse_other_type(file, stream)
                raise broken_file(file, f"its header claims {length} bytes and the file has {status.st_size}")
            text = stream.read(length)
            if not text.startswith(b"{"):
                _refuse_other_type(file, stream)
    except OSError as error:
        raise CheckpointError(f"cannot read {quoted(file)}: {error.strerror}") from None
    return replace(parse_header(text, file, status.st_size), state=FileState.of(file, status))


def _refuse_other_type(file: Path, stream: BinaryIO) -> None:
    """Raise CheckpointError if a file is of another type that `type_by_content` knows."""
    stream.seek(0)
    what = type_by_content(stream.read(LOOKED_AT))
    if what is not None:
        raise CheckpointError(f"{quoted(file)} is not a valid safetensors file: it is {what}")


def _sealed(file: Path) -> CheckpointError:
    """Return the error for a sealed file, which is in the middle of a change in place."""
    if (file.parent / JOURNAL).is_dir():
        way = f"wait for it to end, or finish it with {to_paste('loratool verify PATH', file.parent)}"
        return CheckpointError(f"{quoted(file)} is in the middle of a change in place; {way}")
    return CheckpointError(
        f"{quoted(file)} was left in the middle of a change in place, and the journal that would finish it is gone from "
        f"{quoted(file.parent)}; download or save the model again"
    )


def parse_header(text: bytes, file: Path, size: int) -> Header:
    """Check the JSON `text` of a header against the format's rules and the file's `size` in bytes.

    Raises:
        CheckpointError: as `read_header`.
    """
    entries = _parse_json(text, file)
    metadata = _parse_metadata(entries.pop("__metadata__", None), file)
    data_start = 8 + len(text)
    tensors = {name: _parse_tensor(name, entry, file, data_start) for name, entry in entries.items()}
    _check_layout(tensors, file, data_start, size)
    return Header(file, size, data_start, MappingProxyType(tensors), MappingProxyType(metadata))


def header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return the first bytes of a safetensors file that holds `tensors` (name to dtype and shape) in the given order.

    Metadata keys are sorted, so that equal content gives equal bytes. The header is padded to a multiple of eight bytes.
    """
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + nbytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size in bytes of a tensor of `dtype` and `shape`."""
    return math.prod(shape) * DTYPES[dtype].bits // 8


def _parse_json(text: bytes, file: Path) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise broken_file(file, "its header does not begin with '{'")
    return parse_json_object(text, file)


def _parse_metadata(entry: object, file: Path) -> dict[str, str]:
    if entry is None:
        return {}
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise broken_file(file, "__metadata__ must map strings to strings")
    return entry


def _parse_tensor(name: str, entry: object, file: Path, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise broken_file(file, f"tensor {quoted(name)} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise broken_file(file, f"tensor {quoted(name)} has the unknown dtype {quoted(dtype)}")
    if not _are_sizes(shape):
        raise broken_file(file, f"tensor {quoted(name)} has the impossible shape {quoted(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise broken_file(file, f"tensor {quoted(name)} has the impossible data_offsets {quoted(offsets)}")
    bits = _elements(shape) * DTYPES[dtype].bits
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        taken = f"{offsets[1] - offsets[0]} bytes"
        raise broken_file(file, f"tensor {quoted(name)} of dtype {dtype} and shape {quoted(shape)} cannot take {taken}")
    return TensorInfo(name, dtype, tuple(shape), file, data_start + offsets[0], data_start + offsets[1])


def _are_sizes(value: object) -> bool:
    # The format stores sizes in 64 bits; an isinstance check alone would let True and 10**400 pass.
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _elements(shape: list[int]) -> int:
    """Return the number of elements, or any number beyond 64 bits: the full product of a hostile shape takes hours."""
    count = 1
    for side in shape:
        count *= side
        if count >= 1 << 64:
            break
    return count


def _check_layout(tensors: Mapping[str, TensorInfo], file: Path, data_start: int, size: int) -> None:
    end = data_start
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.stop)):
        if info.start != end:
            kind = "overlaps the tensor before it" if info.start < end else "leaves a hole before it"
            raise broken_file(file, f"tensor {quoted(info.name)} {kind}")
        end = info.stop
    if end != size:
        raise broken_file(file, f"its tensors end at byte {end} and the file has {size}")
