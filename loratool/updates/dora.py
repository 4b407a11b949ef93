"""The update of DoRA (Liu et al. 2024, arXiv:2402.09353, equation 5): W' = m (W + scaling * B A) / ||W + scaling * B A||.

The norm is taken over each row of the sum, the weights of one output, and m holds one magnitude for each output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratool.checkpoint.header import TensorInfo
from loratool.updates.low_rank import LoadedLowRank, LowRank, read_factor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Dora:
    """The low-rank update `product`, and the magnitude m, (out_features,), of each output."""

    product: LowRank
    m: TensorInfo

    @property
    def kind(self) -> str:
        return f"dora r={self.product.rank}"

    @property
    def rank(self) -> int:
        return self.product.rank

    @property
    def scaling(self) -> float:
        return self.product.scaling

    @property
    def shape(self) -> tuple[int, int]:
        return self.product.shape

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {**self.product.tensors, "m": self.m}

    @property
    def needs_weight(self) -> bool:
        return True

    @property
    def needs_outputs(self) -> bool:
        return True

    @property
    def replaces(self) -> bool:
        return False

    @property
    def scalable(self) -> bool:
        return False

    def vanishes(self) -> bool:
        """Return False: magnitudes can change W even if the factors are zero."""
        return False

    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedDora:
        """Read A, B and m as fp32.

        Raises:
            AdapterError: a number is NaN or infinite, or the scaling exceeds fp32.
        """
        assert weight == 1
        assert not transposed
        product = self.product.load(transposed=False, weight=1.0, device=device)
        return LoadedDora(product, read_factor(self.m).flatten().to(device))


@dataclass(frozen=True, slots=True)
class LoadedDora:
    """The product, and m (out_features,), fp32, on one device."""

    product: LoadedLowRank
    m: torch.Tensor
    keeps: ClassVar[bool] = True

    @property
    def outputs(self) -> None:
        """None, because the change is not of low rank."""

    @property
    def inputs(self) -> None:
        """None, because the change is not of low rank."""

    def apply(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> bytes:
        """Apply in PEFT's order, in fp32: add the product to W, then multiply by m over the norms. Return the norms."""
        import torch

        self.product.apply(block, rows, scratch)
        norms = torch.linalg.vector_norm(block, dim=1)
        block.mul_((self.m[rows.start : rows.stop] / norms)[:, None])
        return bytes(norms.cpu().numpy().tobytes())

    def revert(self, block: torch.Tensor, rows: range, scratch: torch.Tensor, kept: bytes = b"") -> None:
        """Revert the update. Without the norms that `apply` returned, assume that the norms equal the magnitudes.

        A row whose magnitude is 0 cannot be recovered.
        """
        import torch

        m = self.m[rows.start : rows.stop]
        if kept:
            norms = torch.frombuffer(bytearray(kept), dtype=torch.float32).to(block.device)
            block.mul_(torch.where(m == 0, m, norms / m)[:, None])
        self.product.revert(block, rows, scratch)
