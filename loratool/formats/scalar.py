"""One number kept as a tensor: kohya's ``alpha``, AdaLoRA's ``ranknum``."""

from __future__ import annotations

import math
import struct
from typing import Final

from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, quoted

_CODES: Final = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "BF16": "<f"}


def read_scalar(info: TensorInfo) -> float:
    """Read the number in a tensor of one element.

    Raises:
        AdapterError: it has an invalid shape or dtype, is NaN or infinite, or the file became shorter.
    """
    if info.dtype not in _CODES or math.prod(info.shape) != 1:
        raise AdapterError(
            f"{quoted(info.name)} in {quoted(info.file)} is {info.dtype} {list(info.shape)} and must be one number"
        )
    with open(info.file, "rb") as stream:
        stream.seek(info.start)
        content = stream.read(info.nbytes)
    if info.dtype == "BF16":
        content = b"\0\0" + content  # bf16 is the upper half of fp32
    if len(content) != struct.calcsize(_CODES[info.dtype]):
        raise AdapterError(f"{quoted(info.file)} became shorter while it was read; run the command again")
    value = float(struct.unpack(_CODES[info.dtype], content)[0])
    if not math.isfinite(value):
        raise AdapterError(f"{quoted(info.name)} in {quoted(info.file)} is {value} and must be a number; save it again")
    return value
