"""The update of HiRA (Huang et al. 2025, ICLR, "Parameter-efficient Hadamard high-rank adaptation"): W' = W + W * (B A)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratool.updates.low_rank import LoadedLowRank
from loratool.updates.relative import Relative

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Hira(Relative):
    """Adds to W its product, element by element, with ``B A``: A (r, in_features) and B (out_features, r)."""

    scaling: ClassVar[float] = 1.0

    @property
    def kind(self) -> str:
        return f"hira r={self.rank}"

    @property
    def rank(self) -> int:
        return self.tensors["A"].shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensors["B"].shape[0], self.tensors["A"].shape[1]

    def changer(self, numbers: Mapping[str, torch.Tensor], *, transposed: bool) -> Shares:
        """Return ``B A``, or its transpose."""
        return Shares(LoadedLowRank(numbers["A"], numbers["B"], 1.0, transposed))


class Shares:
    """The share of each element of W that is added to it: a product, or its transpose."""

    def __init__(self, product: LoadedLowRank) -> None:
        self._product = product

    def change(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        self._product.multiply(rows, scratch)
        block.add_(scratch.mul_(block))

    def restore(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        """Divide by 1 plus the shares. What a share of -1 took cannot be recovered, and stays 0."""
        import torch

        scratch.zero_()
        self._product.revert(scratch, rows, torch.empty_like(scratch))  # minus the shares
        scratch.neg_().add_(1)
        block.div_(torch.where(scratch == 0, torch.ones_like(scratch), scratch))
