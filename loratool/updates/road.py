"""The update of RoAd (Liao et al. 2024, arXiv:2409.00119, equation 4): W' = R W and b' = R b, where R turns pairs of outputs.

In each group of outputs, one of the first half and its partner of the second half become ``f x - s y`` and ``f' y + s' x``: f is
``alpha cos(theta)``, and s is ``alpha sin(theta)``. Variants 1, 2 and 4 have one angle for a pair, one for each output, or two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Final

from loratool.errors import AdapterError
from loratool.updates.relative import Relative
from loratool.updates.rotation import whole_of
from loratool.updates.turns import cos_and_sin

if TYPE_CHECKING:
    import torch

ANGLES: Final = {"road_1": 0.5, "road_2": 1.0, "road_4": 2.0}
"""Number of angles for each output, by variant."""


@dataclass(frozen=True, slots=True)
class Road(Relative):
    """Turns the outputs of W, or of a bias, whose shape is `size`, by ``theta`` and ``alpha``, in groups of `group` outputs."""

    variant: str
    group: int
    size: tuple[int, ...]
    only_if_present: ClassVar[bool] = True
    undivided: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        return self.variant

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    def changer(self, numbers: Mapping[str, torch.Tensor], *, transposed: bool) -> Turns:
        """Return R."""
        return Turns(numbers["theta"], numbers["alpha"], self.variant, self.group, is_row=transposed or len(self.size) == 1,
                     is_vector=len(self.size) == 1)  # fmt: skip


class Turns:
    """R, from the angles of all outputs. The outputs are the columns of a block if `is_row`."""

    def __init__(self, theta: torch.Tensor, alpha: torch.Tensor, variant: str, group: int, *, is_row: bool,
                 is_vector: bool) -> None:  # fmt: skip
        self._group, self._is_row, self._is_vector = group, is_row, is_vector
        self._theta, self._alpha = (_columns(each, variant, group) for each in (theta, alpha))

    def change(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        """Multiply as PEFT does; the groups of a matrix one by one, which has the bits of the whole product."""
        import torch

        turns = self._turns[self._groups(block, rows)]
        if self._is_vector:
            block.copy_(torch.matmul(whole_of(turns), block[0]))
            return
        outputs = (block.T if self._is_row else block).reshape(len(turns), self._group, -1)
        turned = torch.bmm(turns, outputs).view(len(turns) * self._group, -1)
        block.copy_(turned.T if self._is_row else turned)

    def restore(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        """Solve for each pair. A pair that R maps to less than two numbers stays as it is."""
        import torch

        half = self._group // 2
        f, s = (each[self._groups(block, rows)].view(-1, 2, half, 1) for each in self._exact)
        outputs = (block.T if self._is_row else block).double().reshape(-1, 2, half, block.numel() // (f.numel()))
        scale = f[:, 0] * f[:, 1] + s[:, 0] * s[:, 1]
        x, y = outputs[:, 0], outputs[:, 1]
        solved = torch.stack([f[:, 1] * x + s[:, 0] * y, f[:, 0] * y - s[:, 1] * x], 1) / scale[:, None]
        found = torch.where(scale[:, None] == 0, outputs, solved).reshape(f.numel(), -1)
        block.copy_(found.T if self._is_row else found)

    def _groups(self, block: torch.Tensor, rows: range) -> slice:
        if self._is_row:
            return slice(None)
        if rows.start % self._group or len(rows) % self._group:
            raise AdapterError(
                f"rows {rows.start} to {rows.stop - 1} of a matrix hold no whole groups of {self._group} outputs"
            )
        return slice(rows.start // self._group, rows.stop // self._group)

    @cached_property
    def _turns(self) -> torch.Tensor:
        """R's blocks, fp32, (groups, group, group)."""
        first, second = self._alpha[0] * self._theta[0].cos(), self._alpha[1] * self._theta[1].sin()
        half = self._group // 2
        turns = first.new_zeros(len(first), self._group, self._group)
        turns.diagonal(dim1=1, dim2=2).copy_(first)
        turns[:, :half, half:].diagonal(dim1=1, dim2=2).copy_(-second[:, :half])
        turns[:, half:, :half].diagonal(dim1=1, dim2=2).copy_(second[:, half:])
        return turns

    @cached_property
    def _exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """f and s, fp64, (groups, group), with the same bits on every machine."""
        cos, sin = cos_and_sin(self._theta[0])[0], cos_and_sin(self._theta[1])[1]
        return self._alpha[0].double() * cos, self._alpha[1].double() * sin


def _columns(numbers: torch.Tensor, variant: str, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers of each output for f and for s, (groups, group) each."""
    if variant == "road_4":
        pairs = numbers.reshape(-1, 2, group)
        return pairs[:, 0], pairs[:, 1]
    if variant == "road_1":
        numbers = numbers.reshape(-1, group // 2).repeat_interleave(2, dim=0)
    each = numbers.reshape(-1, group)
    return each, each
