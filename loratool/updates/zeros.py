"""Whether a tensor of an adapter contains only zeros, read without torch, one tensor at a time."""

from __future__ import annotations

from loratool.checkpoint.dtypes import DTYPES
from loratool.checkpoint.header import TensorInfo


def only_zeros(info: TensorInfo, rows: int | None = None, columns: int | None = None) -> bool:
    """Return whether all numbers of a tensor, or in the first `rows` and `columns` of a matrix, are 0.0 or -0.0.

    Return False for dtypes that are not floating-point types of whole bytes.
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
