"""What became of a block of codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Moves:
    """What became of a block.

    Attributes:
        at: (n,) int64, where the codes that moved are in the flattened block.
        jumps: (n,) fp32, by how much the numbers that they stand for changed.
        squares: the sum of the squares of all numbers of the block, before.
        hint: what `LoadedWeight.recover` needs.
        cut: how many codes stopped at an outermost level that chance would have led farther.
    """

    at: torch.Tensor
    jumps: torch.Tensor
    squares: float
    hint: bytes
    cut: int = 0
