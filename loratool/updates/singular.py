"""The update in singular value form of AdaLoRA (Zhang et al. 2023, arXiv:2303.10512, equation 3): W' = W + P Lambda Q."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from loratool.checkpoint.header import TensorInfo
from loratool.updates.low_rank import LoadedLowRank, checked_scaling, read_factor
from loratool.updates.zeros import only_zeros

if TYPE_CHECKING:
    import torch

RANK_EPSILON: Final = 1e-5
"""Added to the rank in the divisor by the reference implementation and by PEFT."""


@dataclass(frozen=True, slots=True)
class SingularValue:
    """``alpha / (ranknum + 1e-5) * B (A * E)`` with A (r, in_features), E (r, 1) and B (out_features, r).

    The paper's P, Lambda and Q are B, E and A. `ranknum` is the rank at the start of training: pruning removes components
    and leaves the scaling unchanged. Rank 0 changes nothing.
    """

    a: TensorInfo
    e: TensorInfo
    b: TensorInfo
    alpha: float
    ranknum: int
    needs_weight: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    scalable: ClassVar[bool] = True

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def kind(self) -> str:
        return f"adalora r={self.rank}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def scaling(self) -> float:
        return self.alpha / (self.ranknum + RANK_EPSILON)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {"A": self.a, "E": self.e, "B": self.b}

    def vanishes(self) -> bool:
        """Return whether its alpha, its rank, or one of its factors is zero."""
        return self.alpha == 0 or self.rank == 0 or any(only_zeros(info) for info in (self.e, self.b, self.a))

    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedSingularValue:
        """Read A, E and B as fp32.

        Raises:
            AdapterError: a factor contains NaN or infinity, or the scaling exceeds fp32.
        """
        import torch

        alpha = checked_scaling(self.alpha * weight, self.a)
        a, e, b = (read_factor(info).to(device) for info in (self.a, self.e, self.b))
        product = LoadedLowRank(a * e, b, self.scaling * weight, transposed)
        divisor = torch.full((1,), float(self.ranknum), device=device) + RANK_EPSILON
        return LoadedSingularValue(product, alpha, divisor)

    def read_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Read ``A * E`` and B, fp32."""
        a, e, b = (read_factor(info) for info in (self.a, self.e, self.b))
        return a * e, b


@dataclass(frozen=True)
class LoadedSingularValue:
    """``alpha * B (A * E) / divisor``, or its transpose, on one device; `divisor` is an fp32 tensor (1,)."""

    product: LoadedLowRank
    alpha: float
    divisor: torch.Tensor
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
        """Add the update in PEFT's order, in fp32: product, times alpha, divided by the rank, plus W."""
        self.product.multiply(rows, scratch)
        block.add_(scratch.mul_(self.alpha).div_(self.divisor))
        return b""

    def revert(self, block: torch.Tensor, rows: range, scratch: torch.Tensor, kept: bytes = b"") -> None:
        """Subtract the update, with the same bits on every machine; with rank 0, do nothing."""
        if len(self.product.a):
            self.product.revert(block, rows, scratch)
