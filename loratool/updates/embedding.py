"""The low-rank update of an embedding: E' = E + scaling * (B A)^T, where E is (tokens, features).

An update sees E as its transpose, a matrix from tokens (in) to features (out).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from loratool.checkpoint.header import TensorInfo
from loratool.updates.low_rank import LoadedLowRank, LowRank


@dataclass(frozen=True, slots=True)
class Embedding:
    """The low-rank update `product` of an embedding's transpose, with A (r, tokens) and B (features, r)."""

    product: LowRank
    needs_weight: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    scalable: ClassVar[bool] = True

    @property
    def rank(self) -> int:
        return self.product.rank

    @property
    def scaling(self) -> float:
        return self.product.scaling

    @property
    def kind(self) -> str:
        return f"{self.product.kind} of an embedding"

    @property
    def shape(self) -> tuple[int, int]:
        return self.product.shape

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {"embedding_A": self.product.a, "embedding_B": self.product.b}

    def vanishes(self) -> bool:
        """Return whether the product is zero."""
        return self.product.vanishes()

    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedLowRank:
        """Read A and B as fp32.

        Raises:
            AdapterError: a factor contains NaN or infinity, or the scaling exceeds fp32.
        """
        return self.product.load(transposed=transposed, weight=weight, device=device)
