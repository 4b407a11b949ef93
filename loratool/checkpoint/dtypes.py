"""The dtypes of safetensors: their sizes, their names elsewhere, and the layout of floating-point ones (IEEE 754)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Dtype:
    """One dtype of safetensors.

    Attributes:
        name: its name in safetensors.
        bits: size of one element.
        title: its name in messages.
        torch_name: its name in torch; "" where torch has no such dtype.
        exponent: bits of the exponent; 0 for integers.
        mantissa: bits of the mantissa, which lie below the exponent; 0 for integers.
    """

    name: str
    bits: int
    title: str
    torch_name: str = ""
    exponent: int = 0
    mantissa: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of one element, rounded down."""
        return self.bits // 8

    def as_torch(self) -> torch.dtype:
        """Return the same dtype in torch."""
        import torch

        found: torch.dtype = getattr(torch, self.torch_name)
        return found

    @property
    def exponent_mask(self) -> int:
        """Mask of the exponent's bits. In NaN and infinity, and only there, all of them are set."""
        return ((1 << self.exponent) - 1) << self.mantissa

    @property
    def overflow(self) -> float:
        """Smallest fp32 magnitude that rounds to infinity: half a step above the largest finite number."""
        if self.bits >= 32:
            return math.inf
        largest: float = 2.0 ** ((1 << (self.exponent - 1)) - 1)
        return (2.0 - 2.0 ** -(self.mantissa + 1)) * largest


DTYPES: Final[Mapping[str, Dtype]] = MappingProxyType({
    dtype.name: dtype
    for dtype in (
        Dtype("F64", 64, "fp64", "float64", 11, 52),
        Dtype("F32", 32, "fp32", "float32", 8, 23),
        Dtype("F16", 16, "fp16", "float16", 5, 10),
        Dtype("BF16", 16, "bf16", "bfloat16", 8, 7),
        Dtype("F8_E5M2", 8, "fp8 (e5m2)", "float8_e5m2", 5, 2),
        Dtype("F8_E4M3", 8, "fp8 (e4m3)", "float8_e4m3fn", 4, 3),
        Dtype("F8_E5M2FNUZ", 8, "fp8 (e5m2fnuz)", "float8_e5m2fnuz", 5, 2),
        Dtype("F8_E4M3FNUZ", 8, "fp8 (e4m3fnuz)", "float8_e4m3fnuz", 4, 3),
        Dtype("F8_E8M0", 8, "fp8 (e8m0)", "float8_e8m0fnu", 8, 0),
        Dtype("F6_E2M3", 6, "fp6 (e2m3)", "", 2, 3),
        Dtype("F6_E3M2", 6, "fp6 (e3m2)", "", 3, 2),
        Dtype("F4", 4, "fp4 (e2m1)", "", 2, 1),
        Dtype("C64", 64, "complex64", "complex64"),
        Dtype("I64", 64, "int64", "int64"),
        Dtype("I32", 32, "int32", "int32"),
        Dtype("I16", 16, "int16", "int16"),
        Dtype("I8", 8, "int8", "int8"),
        Dtype("U64", 64, "uint64", "uint64"),
        Dtype("U32", 32, "uint32", "uint32"),
        Dtype("U16", 16, "uint16", "uint16"),
        Dtype("U8", 8, "uint8", "uint8"),
        Dtype("BOOL", 8, "bool", "bool"),
    )
})  # fmt: skip
"""Every dtype of the format, by name."""

DENSE: Final = ("F32", "F16", "BF16")
"""The dtypes of full-precision weights."""

_OF_TORCH: Final = {dtype.torch_name: dtype for dtype in DTYPES.values() if dtype.torch_name}


def of_torch(name: str) -> Dtype:
    """Return the dtype that torch calls `name`, such as ``bfloat16``.

    Raises:
        KeyError: safetensors has no such dtype.
    """
    return _OF_TORCH[name]


def title(name: str) -> str:
    """Return the name of the dtype `name` in messages; an unknown name is returned as it is."""
    return DTYPES[name].title if name in DTYPES else name
