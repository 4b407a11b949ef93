"""The low-rank update of a convolution's kernel: W' = W + scaling * B A, where A is a kernel itself and B one of size 1.

W is (out_channels, in_channels, k...) with one to three sizes k. Blocks are rows of a matrix (out_channels, in_channels * k...).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from loratool.checkpoint.header import TensorInfo
from loratool.updates.low_rank import LoadedLowRank, checked_scaling, read_factor
from loratool.updates.zeros import only_zeros

if TYPE_CHECKING:
    import torch


LEAST_BATCH: Final = 16
"""torch convolves a smaller batch by kernel sizes of 1 differently on one thread, as workers here, than on several, as PEFT."""


@dataclass(frozen=True, slots=True)
class Convolution:
    """``scaling * B A`` with A (r, in_channels, k...) and B (out_channels, r, 1...)."""

    a: TensorInfo
    b: TensorInfo
    scaling: float
    needs_weight: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    scalable: ClassVar[bool] = True

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def kind(self) -> str:
        return f"lora r={self.rank} of a convolution"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.b.shape[0], *self.a.shape[1:]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {"A": self.a, "B": self.b}

    def vanishes(self) -> bool:
        """Return whether its scaling, its rank, or one of its factors is zero."""
        return self.scaling == 0 or self.rank == 0 or only_zeros(self.b) or only_zeros(self.a)

    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedConvolution:
        """Read A and B as fp32.

        Raises:
            AdapterError: a factor contains NaN or infinity, or the scaling exceeds fp32.
        """
        scaling = checked_scaling(self.scaling * weight, self.a)
        a, b = (read_factor(info).to(device) for info in (self.a, self.b))
        product = LoadedLowRank(a.view(len(a), -1), b.view(len(b), -1), scaling, transposed=transposed)
        return LoadedConvolution(product, a.shape[1:])


@dataclass(frozen=True, slots=True)
class LoadedConvolution:
    """The product as one of matrices, B (out_channels, r) and A (r, in_channels * k...), and the shape (in_channels, k...)."""

    product: LoadedLowRank
    inputs_shape: tuple[int, ...]
    keeps: ClassVar[bool] = False

    @property
    def outputs(self) -> torch.Tensor:
        """The same as those of the product."""
        return self.product.outputs

    @property
    def inputs(self) -> torch.Tensor:
        """The same as those of the product."""
        return self.product.inputs

    def apply(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> bytes:
        """Add the update in PEFT's order, in fp32: product, times scaling, plus W."""
        self._multiply(rows, scratch)
        block.add_(scratch.mul_(self.product.scaling))
        return b""

    def _multiply(self, rows: range, out: torch.Tensor) -> None:
        """Write the `rows` of the unscaled product to `out`, summed in PEFT's order: by convolving A with B."""
        import torch

        kernel, product = self.inputs_shape[1:], self.product
        if kernel == (1, 1) or math.prod(out.shape) == 0:
            product.multiply(rows, out)
            return
        convolve = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[len(kernel)]
        a = product.a.view(-1, *self.inputs_shape).transpose(0, 1)
        b = product.b[rows.start : rows.stop].view(len(rows), -1, *(1 for _ in kernel))
        if 1 < len(a) < LEAST_BATCH:
            a = torch.cat([a] * -(-LEAST_BATCH // len(a)))
        convolved = convolve(a, b)[: self.inputs_shape[0]]
        out.view(len(rows), *self.inputs_shape).copy_(convolved.transpose(0, 1))

    def revert(self, block: torch.Tensor, rows: range, scratch: torch.Tensor, kept: bytes = b"") -> None:
        """Subtract the update, with the same bits on every machine."""
        self.product.revert(block, rows, scratch)
