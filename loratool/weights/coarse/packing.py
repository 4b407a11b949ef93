"""The layout of codes in bytes."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor


class Packing(Hashable, Protocol):
    """Extracts the codes of a block from its bytes, and writes them back.

    Attributes:
        per_byte: number of codes in a byte that `open` returns: 1, or 2 for codes of 4 bits.
        high_first: whether the first of two codes is in the upper half.
    """

    @property
    def per_byte(self) -> int: ...

    @property
    def high_first(self) -> bool: ...

    def open(self, rows: range, parts: tuple[Tensor, ...]) -> Tensor:
        """Return the codes of these rows, uint8, flat, row by row. The result may be a part itself."""

    def close(self, rows: range, parts: tuple[Tensor, ...], raw: Tensor) -> None:
        """Write the changed codes that `open` returned into the parts. Other bytes stay the same."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """Codes that are stored as the machine uses them, one or two per byte in a single part. They change in place."""

    per_byte: int = 1
    high_first: bool = False

    def open(self, rows: range, parts: tuple[Tensor, ...]) -> Tensor:
        (raw,) = parts
        return raw

    def close(self, rows: range, parts: tuple[Tensor, ...], raw: Tensor) -> None:
        if raw.data_ptr() != parts[0].data_ptr():
            parts[0].copy_(raw)
