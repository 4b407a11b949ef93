"""The update of LoHa (Hyeon-Woo et al. 2021, arXiv:2108.06098, proposition 1; LyCORIS, arXiv:2309.14859).

D is the Hadamard product of two low-rank products, ``(w1_a w1_b) * (w2_a w2_b)``, so that rank r gives it a rank up to r squared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.updates.additive import Additive, Delta
from loratool.updates.low_rank import fixed_product

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Loha(Additive):
    """``scaling * ((w1_a w1_b) * (w2_a w2_b))`` with w1_a, w2_a (out_features, r) and w1_b, w2_b (r, in_features)."""

    @property
    def rank(self) -> int:
        return self.tensors["w1_b"].shape[0]

    @property
    def kind(self) -> str:
        return f"loha r={self.rank}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensors["w1_a"].shape[0], self.tensors["w1_b"].shape[1]

    def delta(self, numbers: Mapping[str, torch.Tensor]) -> Delta:
        """Return D from its factors."""
        return HadamardProduct(*((numbers[f"w{place}_a"], numbers[f"w{place}_b"]) for place in (1, 2)))


class HadamardProduct:
    """``(left right) * (left right)``, for two pairs: left (out_features, r), right (r, in_features)."""

    def __init__(self, first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._pairs = first, second

    def part(self, outputs: slice, inputs: slice) -> torch.Tensor:
        first, second = ((left[outputs], right[:, inputs]) for left, right in self._pairs)
        return (first[0] @ first[1]).mul_(second[0] @ second[1])

    def fixed(self, outputs: slice, inputs: slice) -> torch.Tensor:
        first, second = (fixed_product(left[outputs], right[:, inputs]) for left, right in self._pairs)
        return first.mul_(second)
