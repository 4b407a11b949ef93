"""Refusing adapters that hold NaN or infinity, without torch."""

from __future__ import annotations

from typing import Final

from loratool.errors import AdapterError, quoted
from loratool.formats.adapter import Adapter

EXPONENTS: Final = {
    "F64": ("<u8", 0x7FF << 52),
    "F32": ("<u4", 0xFF << 23),
    "F16": ("<u2", 0x1F << 10),
    "BF16": ("<u2", 0xFF << 7),
}
"""For each floating-point dtype the integer of its size, and the bits that are all set in NaN and infinity alone."""


def refuse_not_finite(adapter: Adapter) -> None:
    """Raise AdapterError if a factor holds NaN or infinity, or is of no floating-point dtype; one is read at a time."""
    import numpy as np

    with open(adapter.file, "rb") as stream:
        for info in adapter.tensors:
            if info.dtype not in EXPONENTS:
                raise AdapterError(f"{quoted(info.name)} in {quoted(info.file)} has dtype {info.dtype}, no factor's")
            integer, exponent = EXPONENTS[info.dtype]
            stream.seek(info.start)
            bits = np.frombuffer(stream.read(info.nbytes), integer)
            if ((bits & np.array(exponent, integer)) == exponent).any():
                raise AdapterError(
                    f"{quoted(info.name)} in {quoted(info.file)} holds NaN or infinity; "
                    "the training of this adapter failed"
                )
