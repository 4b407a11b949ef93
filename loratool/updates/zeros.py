"""Whether a tensor of an adapter holds nothing but zeros. Read without torch, one tensor at a time."""

from __future__ import annotations

from loratool.checkpoint.dtypes import DTYPES
from loratool.checkpoint.header import TensorInfo


def only_zeros(info: TensorInfo, rows: int | None = None, columns: int | None = None) -> bool:
    """Whether all numbers of a tensor are 0.0 or -0.0; of a matrix, those in its first `rows` and `columns`.

    False where the dtype is not a floating-point one of whole bytes.
    """
    import numpy as np

    dtype = DTYPES[info.dtype]
    if not dtype.exponent or dtype.bits % 8:
        return False
    with open(info.file, "rb") as stream:
        stream.seek(info.start)
        bits = np.frombuffer(stream.read(info.nbytes), f"<u{dtype.nbytes}")
    if rows is not None or columns is not None:
        bits = bits.reshape(info.shape)[:rows, :columns]
    magnitude = (1 << (dtype.bits - 1)) - 1
    return not (bits & np.array(magnitude, bits.dtype)).any()
