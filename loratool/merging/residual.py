"""The residual of a merge: the compressed differences between W and ``round(W' - delta)``.

Nearly all differences are where W' is stored more coarsely than W: an update that carried an element into a higher
binade lost bits that arithmetic cannot restore. The unmerging side can compute these positions itself, so they are not
stored. Elements are sorted by their doubt, the number of bits lost (`StoredWeight.doubt`), and for each doubt from 1 to
`MOST_DOUBT` the differences of all its elements are stored in sequence. Among the elements without doubt, the few that
differ are listed: the distances between them, one byte each (255 means "255 and more to come"), and their differences.

Bit patterns are subtracted as integers, zigzag coded (0, -1, 1, -2, ... become 0, 1, 2, 3, ...) and split into planes of
bytes. Every stream is compressed by Zstandard, whose entropy coder brings the differences of doubt 1 to about two bits
each. Layout: the lengths of the streams, little-endian uint32 (distances, their differences, then one for each doubt),
then the streams; an empty stream has length 0.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

import zstandard

from loratool.errors import RestoreError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]

LEVEL: Final = 3
MOST_DOUBT: Final = 3
_LENGTHS: Final = struct.Struct(f"<{2 + MOST_DOUBT}I")
_ESCAPE: Final = 255


def residual(original: Bytes, predicted: Bytes, doubt: Bytes, width: int, level: int = LEVEL) -> bytes:
    """Return the residual that turns `predicted` into `original`: bytes of elements of `width` 1, 2 or 4 bytes.

    `doubt` has a number from 0 to `MOST_DOUBT` for each element; `level` is Zstandard's compression level.
    """
    import numpy as np

    difference = (original.view(_unsigned(width)) - predicted.view(_unsigned(width))).view(_signed(width))
    doubtful = np.flatnonzero(doubt != 0)
    degrees, doubted = doubt[doubtful], difference[doubtful]
    difference[doubtful] = 0
    listed = np.flatnonzero(difference != 0)
    streams = [_pack_places(listed), _pack(difference[listed], width)]
    streams += [_pack(doubted[degrees == degree], width) for degree in range(1, MOST_DOUBT + 1)]
    compressor = zstandard.ZstdCompressor(level=level)
    packed = [compressor.compress(stream) if stream else b"" for stream in streams]
    return _LENGTHS.pack(*map(len, packed)) + b"".join(packed)


def add_residual(predicted: Bytes, doubt: Bytes, packed: memoryview, width: int) -> memoryview:
    """Turn `predicted` into the original in place, and return the rest of `packed` after the residual.

    Raises:
        RestoreError: `packed` is not a residual of this many elements.
    """
    import numpy as np

    elements = predicted.view(_unsigned(width))
    try:
        lengths, at, streams = _LENGTHS.unpack_from(packed), _LENGTHS.size, []
        for length in lengths:
            streams.append(_decompress(packed[at : at + length], length, (width + 1) * len(elements)))
            at += length
        listed = _unpack_places(streams[0])
        elements[listed] += _unpack(streams[1], width, len(listed))
        doubtful = np.flatnonzero(doubt != 0)
        degrees = doubt[doubtful]
        for degree, stream in enumerate(streams[2:], start=1):
            places = doubtful[degrees == degree]
            elements[places] += _unpack(stream, width, len(places))
    except (ValueError, IndexError, struct.error, zstandard.ZstdError):
        raise RestoreError("a block of the undo file is damaged") from None
    return packed[at:]


def pack_hint(hint: bytes) -> bytes:
    """Pack a storage's hint, which precedes a residual: int32 numbers, most of them close to the previous one."""
    import numpy as np

    numbers = np.frombuffer(hint, "<i4")
    packed = (
        zstandard.ZstdCompressor(level=LEVEL).compress(_pack(np.diff(numbers, prepend=np.int32(0)), 4)) if hint else b""
    )
    return struct.pack("<I", len(packed)) + packed


def unpack_hint(packed: memoryview, limit: int) -> tuple[bytes, memoryview]:
    """Return the hint that `pack_hint` packed, at most `limit` bytes, and the rest of `packed`.

    Raises:
        RestoreError: `packed` does not begin with a valid hint.
    """
    import numpy as np

    try:
        (length,) = struct.unpack_from("<I", packed)
        planes = _decompress(packed[4 : 4 + length], length, limit)
        numbers = np.cumsum(_unpack(planes, 4, len(planes) // 4), dtype=np.uint32)
    except (ValueError, struct.error, zstandard.ZstdError):
        raise RestoreError("a block of the undo file is damaged") from None
    return numbers.astype("<u4").tobytes(), packed[4 + length :]


def _pack(difference: npt.NDArray[Any], width: int) -> bytes:
    """Return signed differences, zigzag coded, as planes of bytes."""
    import numpy as np

    zigzag = ((difference << 1) ^ (difference >> (8 * width - 1))).view(np.uint8)
    return np.ascontiguousarray(zigzag.reshape(-1, width).T).tobytes()


def _unpack(planes: Bytes, width: int, count: int) -> npt.NDArray[Any]:
    """Return the `count` differences in `planes`, as unsigned numbers that wrap around."""
    import numpy as np

    zigzag = np.ascontiguousarray(planes.reshape(width, count).T).view(_unsigned(width)).reshape(count)
    restored: npt.NDArray[Any] = (zigzag >> 1) ^ (0 - (zigzag & 1))
    return restored


def _pack_places(places: npt.NDArray[np.int64]) -> bytes:
    import numpy as np

    gaps = np.diff(places, prepend=-1) - 1
    escapes = gaps // _ESCAPE
    packed = np.full(int(escapes.sum()) + len(gaps), _ESCAPE, np.uint8)
    packed[np.cumsum(escapes + 1) - 1] = gaps % _ESCAPE
    return packed.tobytes()


def _unpack_places(packed: Bytes) -> npt.NDArray[np.int64]:
    import numpy as np

    (ends,) = np.nonzero(packed != _ESCAPE)
    return np.cumsum(packed, dtype=np.int64)[ends] + np.arange(len(ends))


def _decompress(stream: memoryview, length: int, limit: int) -> Bytes:
    """Decompress a stream of `length` bytes to at most `limit` bytes."""
    import numpy as np

    if len(stream) != length:
        raise ValueError("truncated")
    if not length:
        return np.empty(0, np.uint8)
    if zstandard.get_frame_parameters(stream).content_size > limit:
        raise ValueError("too large")
    return np.frombuffer(zstandard.ZstdDecompressor().decompress(stream, max_output_size=limit), np.uint8)


def _unsigned(width: int) -> Any:
    import numpy as np

    return {1: np.uint8, 2: np.uint16, 4: np.uint32}[width]


def _signed(width: int) -> Any:
    import numpy as np

    return {1: np.int8, 2: np.int16, 4: np.int32}[width]
