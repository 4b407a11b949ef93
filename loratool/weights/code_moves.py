"""The changes of codes in a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Moves:
    """The codes of a block that changed.

    Attributes:
        at: (n,) int64, positions of the changed codes in the flattened block.
        jumps: (n,) fp32, the changes of their values.
        squares: sum of the squares of all numbers in the block, before the change.
        hint: the hint for `LoadedWeight.recover`.
        cut: number of codes that stopped at an outermost level although their rounding would have gone further.
    """

    at: torch.Tensor
    jumps: torch.Tensor
    squares: float
    hint: bytes
    cut: int = 0
