"""What arithmetic cannot take back of a merge: the few elements that ``round(W' - delta)`` misses, compressed.

About one element in a hundred differs, nearly all by one unit in the last place. So a block's residual is a sparse
list: the distances between the elements that differ, one byte each (255 means "255 and more to come"), and the
differences of their bit patterns as integers, zigzag coded (0, -1, 1, -2, ... become 0, 1, 2, 3, ...) and split into
planes of bytes. Both are compressed by Zstandard, whose entropy coder brings them to about 10 bits an element.

Layout: two little-endian uint32, the lengths of the two compressed streams, then the streams.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

import zstandard

from loratool.errors import RestoreError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

LEVEL: Final = 3
_LENGTHS: Final = struct.Struct("<II")
_ESCAPE: Final = 255


def residual(original: npt.NDArray[np.uint8], predicted: npt.NDArray[np.uint8], width: int) -> bytes:
    """The residual that turns `predicted` into `original`, both the bytes of elements of `width` 1, 2 or 4 bytes."""
    import numpy as np

    difference = original.view(_unsigned(width)) - predicted.view(_unsigned(width))
    (places,) = np.nonzero(difference)
    if not len(places):
        return _LENGTHS.pack(0, 0)
    signed = difference[places].view(_signed(width))
    zigzag = ((signed << 1) ^ (signed >> (8 * width - 1))).view(np.uint8)
    planes = np.ascontiguousarray(zigzag.reshape(-1, width).T)
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    streams = [compressor.compress(_pack_places(places)), compressor.compress(planes.tobytes())]
    return _LENGTHS.pack(*map(len, streams)) + b"".join(streams)


def add_residual(predicted: npt.NDArray[np.uint8], packed: memoryview, width: int) -> memoryview:
    """Turn `predicted` into the original in place; returns what follows the residual in `packed`.

    Raises:
        RestoreError: `packed` is not a residual of as many elements.
    """
    import numpy as np

    elements = predicted.view(_unsigned(width))
    try:
        lengths = _LENGTHS.unpack_from(packed)
        first, second = _LENGTHS.size + lengths[0], _LENGTHS.size + sum(lengths)
        if second > len(packed):
            raise ValueError("truncated")
        if lengths == (0, 0):
            return packed[second:]
        places = _unpack_places(_decompress(packed[_LENGTHS.size : first], 2 * len(elements) + 1))
        planes = _decompress(packed[first:second], len(elements) * width).reshape(width, -1)
        if planes.shape[1] != len(places) or places[-1] >= len(elements):
            raise ValueError("counts")
    except (ValueError, IndexError, struct.error, zstandard.ZstdError):
        raise RestoreError("the undo file is damaged: a block of it cannot be read; unmerge from the base") from None
    zigzag = np.ascontiguousarray(planes.T).view(_unsigned(width)).reshape(-1)
    elements[places] += (zigzag >> 1) ^ (0 - (zigzag & 1))
    return packed[second:]


def _pack_places(places: npt.NDArray[np.int64]) -> bytes:
    import numpy as np

    gaps = np.diff(places, prepend=-1) - 1
    escapes = gaps // _ESCAPE
    packed = np.full(int(escapes.sum()) + len(gaps), _ESCAPE, np.uint8)
    packed[np.cumsum(escapes + 1) - 1] = gaps % _ESCAPE
    return packed.tobytes()


def _unpack_places(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    import numpy as np

    (ends,) = np.nonzero(packed != _ESCAPE)
    return np.cumsum(packed, dtype=np.int64)[ends] + np.arange(len(ends))


def _decompress(stream: memoryview, limit: int) -> npt.NDArray[np.uint8]:
    import numpy as np

    parameters = zstandard.get_frame_parameters(stream)
    if parameters.content_size > limit:
        raise ValueError("too large")
    return np.frombuffer(zstandard.ZstdDecompressor().decompress(stream, max_output_size=limit), np.uint8)


def _unsigned(width: int) -> Any:
    import numpy as np

    return {1: np.uint8, 2: np.uint16, 4: np.uint32}[width]


def _signed(width: int) -> Any:
    import numpy as np

    return {1: np.int8, 2: np.int16, 4: np.int32}[width]
