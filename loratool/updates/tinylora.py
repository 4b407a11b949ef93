"""The update of TinyLoRA (Morris et al. 2026, arXiv:2602.04118): a product of fixed factors, with a few trained numbers between.

D is ``B R A``, and R the sum of random matrices, ``sum_i v_i P_i``, by a vector v that modules share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.updates.additive import Additive, Delta
from loratool.updates.low_rank import fixed_product
from loratool.updates.product import Product

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class TinyLora(Additive):
    """With A (r, in_features), B (out_features, r), P (u, r, r) and v (u,)."""

    @property
    def rank(self) -> int:
        return self.tensors["A"].shape[0]

    @property
    def kind(self) -> str:
        return f"tinylora r={self.rank}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensors["B"].shape[0], self.tensors["A"].shape[1]

    def delta(self, numbers: Mapping[str, torch.Tensor]) -> Delta:
        """Return D from its tensors."""

        def factors(fixed: bool) -> tuple[torch.Tensor, torch.Tensor]:
            import torch

            a, b, p, v = (numbers[letter] for letter in "ABPv")
            if not fixed:
                return b @ torch.einsum("i,ijk->jk", v, p), a
            between = fixed_product(v[None], p.flatten(1)).float().view(self.rank, self.rank)
            return fixed_product(b, between).float(), a

        return Product(factors)
