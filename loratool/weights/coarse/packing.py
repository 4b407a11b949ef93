"""How codes lie in bytes."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor


class Packing(Hashable, Protocol):
    """Takes the codes of a block out of its bytes, and puts them back.

    Attributes:
        per_byte: how many codes a byte of `open` holds: 1, or 2 where codes have 4 bits.
        high_first: whether the first of two lies in the upper half.
    """

    @property
    def per_byte(self) -> int: ...

    @property
    def high_first(self) -> bool: ...

    def open(self, rows: range, parts: tuple[Tensor, ...]) -> Tensor:
        """The codes of these rows, uint8, flat, row by row. They may be a part itself."""

    def close(self, rows: range, parts: tuple[Tensor, ...], raw: Tensor) -> None:
        """Put codes that `open` gave, and that have changed since, into the parts; other bytes stay as they are."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """Codes that lie in their one part as the machine takes them, one or two a byte: they change where they lie."""

    per_byte: int = 1
    high_first: bool = False

    def open(self, rows: range, parts: tuple[Tensor, ...]) -> Tensor:
        (raw,) = parts
        return raw

    def close(self, rows: range, parts: tuple[Tensor, ...], raw: Tensor) -> None:
        if raw.data_ptr() != parts[0].data_ptr():
            parts[0].copy_(raw)
