"""Which codes of a block of 4-bit numbers may move, and which did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Movable:
    """Codes of a block that chance may move; of all others it is known before that they stay.

    Attributes:
        at: (n,) int64, ascending, where they are in the flattened block.
        places: (n,) int32, where their values are in the order of size.
        scales: (n,) fp32, those of their blocks.
        wanted: (n,) fp32, what is to be added to each, in units of its scale.
        noise: (n,) fp32, chance, from 0 to 1.
    """

    at: torch.Tensor
    places: torch.Tensor
    scales: torch.Tensor
    wanted: torch.Tensor
    noise: torch.Tensor

    def __getitem__(self, few: slice) -> Movable:
        return Movable(self.at[few], self.places[few], self.scales[few], self.wanted[few], self.noise[few])


@dataclass(frozen=True, slots=True)
class Moves:
    """What became of a block.

    Attributes:
        at: (n,) int64, where the codes that moved are in the flattened block.
        jumps: (n,) fp32, by how much the numbers that they stand for changed.
        squares: the sum of the squares of all numbers of the block, before.
        hint: what `LoadedWeight.recover` needs.
    """

    at: torch.Tensor
    jumps: torch.Tensor
    squares: float
    hint: bytes
