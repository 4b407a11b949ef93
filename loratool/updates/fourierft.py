"""The update of FourierFT (Gao et al. 2024, arXiv:2405.03003): W' = W + scaling * Re(F^-1(S)), with a sparse matrix S."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from loratool.updates.additive import Delta
from loratool.updates.low_rank import fixed_product
from loratool.updates.spectral import Spectral
from loratool.updates.turns import TWO_PI, of_angle

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class FourierFt(Spectral):
    """The numbers ``c`` are those of S."""

    @property
    def kind(self) -> str:
        return f"fourierft n={self.tensors['c'].shape[0]}"

    def delta(self, numbers: Mapping[str, torch.Tensor]) -> Delta:
        """Return the inverse Fourier transform of S."""
        return Waves(numbers["c"], self.places().to(numbers["c"].device), self.size)


class Waves:
    """The real part of an inverse Fourier transform, which PEFT computes whole. `places` are those of the numbers `c`."""

    def __init__(self, c: torch.Tensor, places: torch.Tensor, shape: tuple[int, int]) -> None:
        self._c, self._places, self._shape = c, places, shape

    def part(self, outputs: slice, inputs: slice) -> torch.Tensor:
        return self._whole[outputs, inputs].clone()

    @cached_property
    def _whole(self) -> torch.Tensor:
        import torch

        spectrum = self._c.new_zeros(self._shape)
        spectrum.view(-1)[self._places] = self._c
        whole: torch.Tensor = torch.fft.ifft2(spectrum).real.contiguous()
        return whole

    def fixed(self, outputs: slice, inputs: slice) -> torch.Tensor:
        """Return a part as a sum of waves: ``cos(a + b) = cos a cos b - sin a sin b``, with a of rows and b of columns."""
        import torch

        height, width = self._shape
        cos_a, sin_a = self._waves(height, self._places // width, outputs)
        cos_b, sin_b = self._waves(width, self._places % width, inputs)
        c = self._c.double() / (height * width)
        return fixed_product(torch.cat([cos_a * c, sin_a * -c], 1), torch.cat([cos_b, sin_b], 1).T)

    def _waves(self, size: int, frequencies: torch.Tensor, few: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin of each frequency at the places `few`, (places, frequencies)."""
        import torch

        at = torch.arange(few.start, few.stop, device=self._c.device)[:, None] * frequencies % size
        cos, sin = (torch.tensor(table, dtype=torch.float64, device=self._c.device) for table in circle(size))
        return cos[at], sin[at]


@lru_cache(4)
def circle(size: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return cos and sin of ``2 pi t / size`` for t below `size`, with the same bits on every machine."""
    cos, sin = zip(*(of_angle(TWO_PI * place // size) for place in range(size)), strict=True)
    return cos, sin
