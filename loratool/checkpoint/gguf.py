"""Headers of GGUF files, read and checked by the rules of the container. No tensor data is read.

The container (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) holds ``GGUF``, a version, the numbers of tensors
and key-value pairs, the pairs, an entry for each tensor, padding, and the tensors' data. All numbers are little-endian.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final

from loratool.checkpoint.header import TensorInfo
from loratool.checkpoint.json_text import open_without_waiting
from loratool.errors import CheckpointError, quoted

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
LARGEST_HEADER: Final = 64 << 20
"""Largest header that is read, in bytes. The vocabulary of the largest models takes a sixth of that."""

LONGEST_NAME: Final = 65_535
"""Largest length of a key or a tensor's name in bytes, by the container's rules."""

MOST_DIMENSIONS: Final = 4
MOST_KEPT: Final = 64
"""Largest number of elements of an array that is kept. Longer arrays, such as vocabularies, are skipped."""

ALIGNMENT: Final = 32

TYPES: Final[Mapping[int, tuple[str, int, int]]] = MappingProxyType({
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
})  # fmt: skip
"""For each ggml type: its name, the elements of a block along the innermost dimension, and the bytes of a block."""

_NUMBERS: Final = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING: Final = 8
_ARRAY: Final = 9


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The checked header of one GGUF file of `size` bytes.

    Attributes:
        metadata: the key-value pairs: strings, numbers, and short lists of them; the value of a longer array is None.
        tensors: by name. A shape starts with the outermost dimension; a dtype is the name of the ggml type.
    """

    file: Path
    size: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def is_gguf(file: Path) -> bool:
    """Return whether `file` is a regular file that begins with ``GGUF``."""
    try:
        with open(file, "rb", opener=open_without_waiting) as stream:
            return stat.S_ISREG(os.fstat(stream.fileno()).st_mode) and stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_gguf_header(file: Path) -> GgufHeader:
    """Read and check the header of the GGUF file `file`.

    Raises:
        CheckpointError: the file is missing, is not a regular file, or breaks a rule of the container.
    """
    try:
        with open(file, "rb", opener=open_without_waiting) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{quoted(file)} is not a regular file")
            return _parsed(_Reader(stream, file, min(status.st_size, LARGEST_HEADER)), status.st_size)
    except OSError as error:
        raise CheckpointError(f"cannot read {quoted(file)}: {error.strerror}") from None


@dataclass(slots=True)
class _Reader:
    """Reader of a header's parts, one after the other, which stops after `left` bytes."""

    stream: BinaryIO
    file: Path
    left: int
    at: int = 0

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise self.broken("it ends in the middle of its header")
        self.left -= count
        self.at += count
        return self.stream.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def count(self) -> int:
        return int(self.number("<Q"))

    def text(self, longest: int = LARGEST_HEADER) -> str:
        length = self.count()
        if length > longest:
            raise self.broken(f"a name in it has {length:,} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.broken("a text in it is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise self.broken(f"it holds a value of the unknown type {kind}")
        return self.array()

    def array(self) -> list[Any] | None:
        kind, count = int(self.number("<I")), self.count()
        if kind in _NUMBERS and count > MOST_KEPT:
            self.take(struct.calcsize(_NUMBERS[kind]) * count)
            return None
        if kind == _ARRAY:
            raise self.broken("it holds lists in lists")
        kept = [self.value(kind) for _ in range(min(count, MOST_KEPT))]
        for _ in range(count - len(kept)):
            self.value(kind)
        return kept if count <= MOST_KEPT else None

    def broken(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{quoted(self.file)} is not a valid GGUF file: {reason}; download or convert it again")


def _parsed(reader: _Reader, size: int) -> GgufHeader:
    if reader.take(len(MAGIC)) != MAGIC:
        raise reader.broken("it does not begin with 'GGUF'")
    version = int(reader.number("<I"))
    if version not in VERSIONS:
        raise reader.broken(f"its version is {version} and loratool reads versions 2 and 3")
    tensor_count, pair_count = reader.count(), reader.count()
    metadata = _unique(reader, pair_count, lambda name: reader.value(int(reader.number("<I"))), "key")
    entries = _unique(reader, tensor_count, lambda name: _entry(reader, name), "tensor")
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 1 << 16:
        raise reader.broken(f"its alignment is {quoted(alignment, 40)}")
    start = -(-reader.at // alignment) * alignment
    tensors = {name: _placed(reader, name, entry, start, size) for name, entry in entries.items()}
    _refuse_overlaps(reader, tensors)
    return GgufHeader(reader.file, size, MappingProxyType(metadata), MappingProxyType(tensors))


def _unique(reader: _Reader, count: int, read: Callable[[str], Any], what: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(count):
        name = reader.text(LONGEST_NAME)
        if name in found:
            raise reader.broken(f"the {what} {quoted(name)} occurs twice")
        found[name] = read(name)
    return found


def _entry(reader: _Reader, name: str) -> tuple[tuple[int, ...], int, int]:
    """Read a tensor's shape (outermost dimension first), ggml type, and offset from the start of the data."""
    dimensions = int(reader.number("<I"))
    if dimensions > MOST_DIMENSIONS:
        raise reader.broken(f"the tensor {quoted(name)} has {dimensions} dimensions")
    sides = [reader.count() for _ in range(dimensions)]
    if any(side >= 1 << 48 for side in sides):
        raise reader.broken(f"the tensor {quoted(name)} has the impossible shape {quoted(sides)}")
    return tuple(reversed(sides)), int(reader.number("<I")), reader.count()


def _placed(reader: _Reader, name: str, entry: tuple[tuple[int, ...], int, int], start: int, size: int) -> TensorInfo:
    shape, kind, offset = entry
    if kind not in TYPES:
        raise reader.broken(f"the tensor {quoted(name)} has the unknown type {kind}")
    dtype, block, block_bytes = TYPES[kind]
    elements = math.prod(shape)
    if elements % block or (shape and shape[-1] % block):
        raise reader.broken(
            f"the tensor {quoted(name)} of type {dtype} and shape {list(shape)} is not made of whole blocks"
        )
    begin = start + offset
    end = begin + elements // block * block_bytes
    if end > size:
        raise reader.broken(f"the tensor {quoted(name)} ends at byte {end} and the file has {size}")
    return TensorInfo(name, dtype, shape, reader.file, begin, end)


def _refuse_overlaps(reader: _Reader, tensors: Mapping[str, TensorInfo]) -> None:
    end = 0
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.stop)):
        if info.start < end:
            raise reader.broken(f"the tensor {quoted(info.name)} overlaps the tensor before it")
        end = info.stop
