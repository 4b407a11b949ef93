"""The update of WaveFT (Bilican et al. 2025, arXiv:2505.12532): W' = W + scaling * D, D from a sparse matrix of coefficients.

D is their inverse wavelet transform by Haar's wavelet, one level deep, or the coefficients themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loratool.updates.additive import Delta
from loratool.updates.shira import Sparse
from loratool.updates.spectral import Spectral

if TYPE_CHECKING:
    import torch

HALF: Final = 0.4999999701976776123046875
"""The square of 2**-0.5 in fp32, the size of each number in the filters."""

SIGNS: Final = ((1, 1, 1, 1), (1, 1, -1, -1), (1, -1, 1, -1), (1, -1, -1, 1))
"""The signs of the filters in a square of 2 x 2: the means, and the details across rows, across columns and across both."""


@dataclass(frozen=True, slots=True)
class WaveFt(Spectral):
    """The numbers ``c`` are the coefficients; if not `transforms`, they are added as they are."""

    transforms: bool = True

    @property
    def kind(self) -> str:
        return f"waveft n={self.tensors['c'].shape[0]}"

    def delta(self, numbers: Mapping[str, torch.Tensor]) -> Delta:
        """Return D, whose numbers are few."""
        c, places = numbers["c"], self.places().to(numbers["c"].device)
        rows, columns = places // self.size[1], places % self.size[1]
        if self.transforms:
            rows, columns, c = squares(rows, columns, c, self.size)
        order = (rows * self.size[1] + columns).argsort()
        return FewNumbers(Sparse(rows[order].contiguous(), columns[order], c[order]))


@dataclass(frozen=True, slots=True)
class FewNumbers:
    """Numbers at a few places. All others are 0.0, which PEFT adds."""

    numbers: Sparse

    def part(self, outputs: slice, inputs: slice) -> torch.Tensor:
        return self.numbers.part(outputs, inputs).add_(0.0)

    def fixed(self, outputs: slice, inputs: slice) -> torch.Tensor:
        return self.part(outputs, inputs)


def squares(
    rows: torch.Tensor, columns: torch.Tensor, c: torch.Tensor, size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rows, columns and numbers of the inverse Haar transform of coefficients, which adds each to a square of 2 x 2.

    The quarters of the matrix of coefficients, which has an even number of rows and columns, are the means and the three details.
    Numbers of one place are added in that order. Each product and sum is rounded once, as by the convolution in PEFT.
    """
    import torch

    height, width = ((side + 1) // 2 for side in size)
    quarter = (rows >= height) * 2 + (columns >= width)
    band = torch.tensor([0, 1, 2, 3], device=c.device)[quarter]
    signs = torch.tensor(SIGNS, dtype=torch.float64, device=c.device)[band]
    step = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]], device=c.device)
    down, right = (2 * (rows % height))[:, None] + step[0], (2 * (columns % width))[:, None] + step[1]
    places, place = torch.unique(down * 2 * width + right, return_inverse=True)
    total = c.new_zeros(len(places))
    for each in range(len(SIGNS)):
        mine = band == each
        added = (c[mine, None].double() * HALF * signs[mine]).flatten()
        at = place[mine].flatten()
        total[at] = (total[at].double() + added).float()
    down, right = places // (2 * width), places % (2 * width)
    inside = (down < size[0]) & (right < size[1])
    return down[inside], right[inside], total[inside]
