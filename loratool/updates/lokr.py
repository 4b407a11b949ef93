"""The update of LoKr (LyCORIS, arXiv:2309.14859): D is the Kronecker product of two small matrices.

Each of w1 (a, c) and w2 (b, d) is stored whole, or as a product: ``w1_a w1_b``, ``w2_a w2_b``. D is (a b, c d). For a
convolution, w2 is (b, d, k, k), or (b, d k k), or a Tucker product of w2_a (r, b), w2_b (r, d) and a core t2 (r, r, k, k).
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

SIDES: Final = ("w1", "w2")
CORE: Final = "t2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lokr(Additive):
    """``scaling * (w1 x w2)``. `rank` is the configuration's, by which alpha is divided."""

    rank: int

    @property
    def kind(self) -> str:
        return f"lokr r={self.rank}"

    @property
    def shape(self) -> tuple[int, ...]:
        (a, c), (b, d) = (self._shape_of(side) for side in SIDES)
        return a * b, c * d, *self._kernel

    @property
    def _kernel(self) -> tuple[int, ...]:
        """The sizes of a convolution's kernel where a tensor shows them."""
        kernels = (self.tensors.get(letter) for letter in (CORE, "w2"))
        return next((info.shape[2:] for info in kernels if info is not None), ())

    def _shape_of(self, side: str) -> tuple[int, int]:
        if side in self.tensors:
            return self.tensors[side].shape[:2]  # type: ignore[return-value]
        left, right = (self.tensors[f"{side}_{letter}"].shape for letter in "ab")
        return left[1 if self._is_tucker(side) else 0], right[1]

    def _is_tucker(self, side: str) -> bool:
        return side == "w2" and CORE in self.tensors

    def delta(self, numbers: Mapping[str, torch.Tensor]) -> Delta:
        """Return D from its factors; each row of a convolution's D holds the weights of one output."""
        first, second = (tuple(numbers[letter] for letter in self._letters(side)) for side in SIDES)
        return KroneckerProduct(first, second)

    def _letters(self, side: str) -> tuple[str, ...]:
        if side in self.tensors:
            return (side,)
        return (f"{side}_a", f"{side}_b", *((CORE,) if self._is_tucker(side) else ()))


@dataclass(frozen=True)
class KroneckerProduct:
    """``w1 x w2``: each is one matrix, the product of two, or the Tucker product of two and a core."""

    first: tuple[torch.Tensor, ...]
    second: tuple[torch.Tensor, ...]

    def part(self, outputs: slice, inputs: slice) -> torch.Tensor:
        return _kronecker(*self._summed, outputs, inputs)

    def fixed(self, outputs: slice, inputs: slice) -> torch.Tensor:
        return _kronecker(*self._fixed, outputs, inputs)

    @cached_property
    def _summed(self) -> tuple[torch.Tensor, torch.Tensor]:
        return _summed(self.first), _summed(self.second)

    @cached_property
    def _fixed(self) -> tuple[torch.Tensor, torch.Tensor]:
        return _fixed(self.first), _fixed(self.second)


def _summed(factors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return a factor of the Kronecker product as a matrix, computed in PEFT's order."""
    import torch

    match factors:
        case (whole,):
            return whole.flatten(1)
        case (left, right):
            return left @ right
        case (left, right, core):
            return torch.einsum("i j k l, i p, j r -> p r k l", core, left, right).flatten(1)
    raise AssertionError(len(factors))


def _fixed(factors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the same, fp64, with the same bits on every machine."""
    match factors:
        case (whole,):
            return whole.flatten(1).double()
        case (left, right):
            return fixed_product(left, right)
        case (left, right, core):
            return fixed_tucker_product(left, right, core).flatten(1)
    raise AssertionError(len(factors))


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
