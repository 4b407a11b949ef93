"""Refusing adapters that hold NaN or infinity, without torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, quoted
from loratool.formats.adapter import Adapter

EXPONENTS: Final = {
    "F64": ("<u8", 0x7FF << 52),
    "F32": ("<u4", 0xFF << 23),
    "F16": ("<u2", 0x1F << 10),
    "BF16": ("<u2", 0xFF << 7),
}
"""For each floating-point dtype, the integer type of its size and the bits that are all set only in NaN and infinity."""


def refuse_not_finite(adapter: Adapter) -> None:
    """Raise AdapterError if a factor contains NaN or infinity, or its dtype is not a floating-point type."""
    for info in adapter.factors:
        if info.dtype not in EXPONENTS:
            raise AdapterError(
                f"{quoted(info.name)} in {quoted(info.file)} has dtype {info.dtype}, which a factor cannot have"
            )
    refuse_numbers_not_finite(adapter.tensors)


def refuse_numbers_not_finite(tensors: Iterable[TensorInfo]) -> None:
    """Raise AdapterError if a floating-point tensor contains NaN or infinity; tensors are read one at a time."""
    import numpy as np

    for info in tensors:
        if info.dtype not in EXPONENTS:
            continue
        integer, exponent = EXPONENTS[info.dtype]
        with open(info.file, "rb") as stream:
            stream.seek(info.start)
            bits = np.frombuffer(stream.read(info.nbytes), integer)
        if ((bits & np.array(exponent, integer)) == exponent).any():
            raise AdapterError(
                f"{quoted(info.name)} in {quoted(info.file)} holds NaN or infinity; the training of this adapter failed"
            )
