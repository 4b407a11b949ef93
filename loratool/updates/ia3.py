"""The update of (IA)^3 (Liu et al. 2022, arXiv:2205.05638, section 3.3): W' = l * W, one factor for each output or each input.

The paper multiplies activations. In PEFT the factors of keys and values multiply their outputs, and so the bias too; those of
feed-forward layers multiply the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratool.updates.relative import Relative
from loratool.updates.shapes import ANY

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Ia3(Relative):
    """Multiplies each output of W by its number in l, (out_features, 1); or `by_input` each input, with l (1, in_features)."""

    by_input: bool = False

    @property
    def kind(self) -> str:
        return "ia3"

    @property
    def shape(self) -> tuple[int, ...]:
        outputs, inputs = self.tensors["l"].shape
        return (ANY, inputs) if self.by_input else (outputs, ANY)

    def changer(self, numbers: Mapping[str, torch.Tensor], *, transposed: bool) -> Factors:
        """Return the factors, as columns of the stored matrix or as a row."""
        factors = numbers["l"]
        return Factors(factors.T.contiguous() if transposed else factors)


@dataclass(frozen=True, slots=True)
class Ia3Bias(Relative):
    """Multiplies each number of a bias by the factor of its output."""

    only_if_present: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        return "ia3"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensors["l"].shape[:1]

    def changer(self, numbers: Mapping[str, torch.Tensor], *, transposed: bool) -> Factors:
        """Return the factors as a row, because a stored vector is one row."""
        return Factors(numbers["l"].view(1, -1))


class Factors:
    """Factors of the rows or the columns of the stored matrix: (rows, 1) or (1, columns)."""

    def __init__(self, factors: torch.Tensor) -> None:
        self._factors = factors

    def change(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        block.mul_(self._of(rows))

    def restore(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        """Divide by the factors. What 0 multiplied cannot be recovered, and stays 0."""
        import torch

        factors = self._of(rows)
        block.div_(torch.where(factors == 0, torch.ones_like(factors), factors))

    def _of(self, rows: range) -> torch.Tensor:
        return self._factors if len(self._factors) == 1 else self._factors[rows.start : rows.stop]
