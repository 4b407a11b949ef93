"""The update of C3A (Chen et al. 2025, arXiv:2407.19342): W' = W + D, where D consists of circulant blocks.

Block (m, n) of D has ``kernel[m, n, (q - p) mod b] / in_features`` in row p and column q. PEFT makes the blocks by Fourier
transforms, whose errors of about 1e-7 depend on the number of threads; here they are the kernel's own numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.updates.additive import Additive, Delta

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class C3a(Additive):
    """D from ``kernel``, (out_features / b, in_features / b, b)."""

    @property
    def kind(self) -> str:
        return f"c3a b={self.tensors['kernel'].shape[2]}"

    @property
    def shape(self) -> tuple[int, int]:
        outputs, inputs, size = self.tensors["kernel"].shape
        return outputs * size, inputs * size

    def delta(self, numbers: Mapping[str, torch.Tensor]) -> Delta:
        """Return D from its kernel."""
        return Circulant(numbers["kernel"])


class Circulant:
    """The circulant blocks of a kernel, (m, n, b), divided by the number of inputs."""

    def __init__(self, kernel: torch.Tensor) -> None:
        self._kernel = kernel / (kernel.shape[1] * kernel.shape[2])

    def part(self, outputs: slice, inputs: slice) -> torch.Tensor:
        import torch

        size = self._kernel.shape[2]
        rows, columns = (torch.arange(few.start, few.stop, device=self._kernel.device) for few in (outputs, inputs))
        shift = (columns[None] - rows[:, None]) % size
        return self._kernel[rows[:, None] // size, columns[None] // size, shift]

    def fixed(self, outputs: slice, inputs: slice) -> torch.Tensor:
        return self.part(outputs, inputs)
