"""The update of LoHa (Hyeon-Woo et al. 2021, arXiv:2108.06098, proposition 1; LyCORIS, arXiv:2309.14859).

D is the Hadamard product of two low-rank products, ``(w1_a w1_b) * (w2_a w2_b)``, so that rank r gives it a rank up to r squared.
For a convolution, the factors are of its weights as a matrix, (out_channels, in_channels k k); or each product is a Tucker
product of w_a (r, out_channels), w_b (r, in_channels) and a core t (r, r, k, k).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

from loratool.updates.additive import Additive, Delta
from loratool.updates.low_rank import fixed_product, fixed_tucker_product

if TYPE_CHECKING:
    import torch

CORES: Final = ("t1", "t2")
"""The letters of the cores."""


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
    def shape(self) -> tuple[int, ...]:
        left, right = self.tensors["w1_a"].shape, self.tensors["w1_b"].shape
        core = self.tensors.get(CORES[0])
        return (left[0], right[1]) if core is None else (left[1], right[1], *core.shape[2:])

    def delta(self, numbers: Mapping[str, torch.Tensor]) -> Delta:
        """Return D from its factors; each row of a convolution's D holds the weights of one output."""
        first, second = ((numbers[f"w{place}_a"], numbers[f"w{place}_b"]) for place in (1, 2))
        if CORES[0] not in numbers:
            return HadamardProduct(first, second)
        return HadamardTuckerProduct(
            *((*pair, numbers[core]) for pair, core in zip((first, second), CORES, strict=True))
        )


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


@dataclass(frozen=True)
class HadamardTuckerProduct:
    """The product of two Tucker products, each of left (r, out_channels), right (r, in_channels) and core (r, r, k, k)."""

    first: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    second: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    def part(self, outputs: slice, inputs: slice) -> torch.Tensor:
        return self._whole[outputs, inputs]

    def fixed(self, outputs: slice, inputs: slice) -> torch.Tensor:
        return self._fixed[outputs, inputs]

    @cached_property
    def _whole(self) -> torch.Tensor:
        """All of D: PEFT chooses the order of its sums by the shapes of the whole."""
        import torch

        first, second = (
            torch.einsum("i j k l, j r, i p -> p r k l", core, right, left)
            for left, right, core in (self.first, self.second)
        )
        return (first * second).flatten(1)

    @cached_property
    def _fixed(self) -> torch.Tensor:
        return (fixed_tucker_product(*self.first) * fixed_tucker_product(*self.second)).flatten(1)
