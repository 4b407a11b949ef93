"""What updates have in common that add a matrix with few numbers in a domain of frequencies: their places come from a seed.

The adapter has the numbers only. The shape of W decides with the seed where they are, so a plan must tell it first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from loratool.updates.additive import Additive
from loratool.updates.shapes import ANY

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Spectral(Additive):
    """Made from ``c``, (n,), the numbers at the first places of a permutation that `seed` draws. `size` is the shape of W."""

    seed: int = 0
    size: tuple[int, int] = (ANY, ANY)
    undivided: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    def sized(self, shape: tuple[int, ...]) -> Self:
        """Return the update of a matrix of this shape."""
        outputs, inputs = shape
        return replace(self, size=(outputs, inputs))

    def places(self) -> torch.Tensor:
        """Return the places of the numbers, (n,) int64, counted along the rows of W, as PEFT draws them."""
        import torch

        outputs, inputs = self.size
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(outputs * inputs, generator=generator)[: self.tensors["c"].shape[0]].clone()
