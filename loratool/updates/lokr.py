"""The update of LoKr (LyCORIS, arXiv:2309.14859): D is the Kronecker product of two small matrices.

Each of w1 (a, c) and w2 (b, d) is stored whole, or as a product: ``w1_a w1_b``, ``w2_a w2_b``. D is (a b, c d).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import matmul
from typing import TYPE_CHECKING, Final

from loratool.updates.additive import Additive, Delta
from loratool.updates.low_rank import fixed_product

if TYPE_CHECKING:
    import torch

SIDES: Final = ("w1", "w2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lokr(Additive):
    """``scaling * (w1 x w2)``. `rank` is the configuration's, by which alpha is divided."""

    rank: int

    @property
    def kind(self) -> str:
        return f"lokr r={self.rank}"

    @property
    def shape(self) -> tuple[int, int]:
        (a, c), (b, d) = (self._shape_of(side) for side in SIDES)
        return a * b, c * d

    def _shape_of(self, side: str) -> tuple[int, int]:
        left, right = (self.tensors.get(f"{side}_{letter}", self.tensors.get(side)) for letter in "ab")
        assert left is not None
        assert right is not None
        return left.shape[0], right.shape[1]

    def delta(self, numbers: Mapping[str, torch.Tensor]) -> Delta:
        """Return D from its factors."""
        first, second = (
            (numbers[side],) if side in numbers else (numbers[f"{side}_a"], numbers[f"{side}_b"]) for side in SIDES
        )
        return KroneckerProduct(first, second)


@dataclass(frozen=True)
class KroneckerProduct:
    """``w1 x w2``, each of which is one matrix or the product of two."""

    first: tuple[torch.Tensor, ...]
    second: tuple[torch.Tensor, ...]

    def part(self, outputs: slice, inputs: slice) -> torch.Tensor:
        return _kronecker(*self._summed, outputs, inputs)

    def fixed(self, outputs: slice, inputs: slice) -> torch.Tensor:
        return _kronecker(*self._fixed, outputs, inputs)

    @cached_property
    def _summed(self) -> tuple[torch.Tensor, torch.Tensor]:
        return _product(self.first, matmul), _product(self.second, matmul)

    @cached_property
    def _fixed(self) -> tuple[torch.Tensor, torch.Tensor]:
        return _product(self.first, fixed_product).double(), _product(self.second, fixed_product).double()


def _product(factors: tuple[torch.Tensor, ...], multiply: Callable[..., torch.Tensor]) -> torch.Tensor:
    return factors[0] if len(factors) == 1 else multiply(*factors)


def _kronecker(first: torch.Tensor, second: torch.Tensor, outputs: slice, inputs: slice) -> torch.Tensor:
    """Return a part of ``first x second``, in pieces that are Kronecker products themselves."""
    import torch

    rows = _pieces(outputs, len(first), len(second))
    columns = _pieces(inputs, first.shape[1], second.shape[1])
    return torch.cat([
        torch.cat([torch.kron(first[a, c], second[b, d].contiguous()) for c, d in columns], 1) for a, b in rows
    ])  # fmt: skip


def _pieces(span: slice, first: int, second: int) -> list[tuple[slice, slice]]:
    """Return the slices of the first and second factor whose products make up `span`: at most three.

    Index n of the product is made of index ``n // second`` of the first factor and ``n % second`` of the second.
    """
    start, stop, _ = span.indices(first * second)
    found = []
    while start < stop:
        block, offset = divmod(start, second)
        whole = (stop - start) // second if offset == 0 else 0
        end = start + whole * second if whole else min(stop, (block + 1) * second)
        found.append(
            (slice(block, block + max(whole, 1)), slice(offset, offset + (end - start if not whole else second)))
        )
        start = end
    return found
