"""The update of DeLoRA (Bini et al. 2025, arXiv:2503.18225): a product of factors of a bounded norm.

D is ``B diag(lambda / r / (||A_j|| ||B_j||)) A``, times the norm that each input of the base had when training began, ``w_norm``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

from loratool.updates.additive import Additive, Delta
from loratool.updates.low_rank import fixed_product

if TYPE_CHECKING:
    import torch

LEAST_NORM: Final = 1e-4
"""Least norm that is divided by, in PEFT and in the authors' code."""

SQUARE_BITS: Final = 40
"""Bits to which squares are rounded before an exact sum."""


@dataclass(frozen=True, slots=True)
class Delora(Additive):
    """With A (r, in_features), B (out_features, r), lambda (1,) and w_norm (in_features,)."""

    @property
    def rank(self) -> int:
        return self.tensors["A"].shape[0]

    @property
    def kind(self) -> str:
        return f"delora r={self.rank}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensors["B"].shape[0], self.tensors["A"].shape[1]

    def delta(self, numbers: Mapping[str, torch.Tensor]) -> Delta:
        """Return D from its factors."""
        return NormedProduct(numbers["A"], numbers["B"], numbers["lambda"], numbers["w_norm"])


@dataclass(frozen=True)
class NormedProduct:
    """``(B diag A) * w_norm``, fp32."""

    a: torch.Tensor
    b: torch.Tensor
    bound: torch.Tensor
    w_norm: torch.Tensor

    def part(self, outputs: slice, inputs: slice) -> torch.Tensor:
        return (self._left[outputs] @ self.a[:, inputs]).mul_(self.w_norm[inputs])

    def fixed(self, outputs: slice, inputs: slice) -> torch.Tensor:
        return fixed_product(self._fixed_left[outputs], self.a[:, inputs]).mul_(self.w_norm[inputs].double())

    @cached_property
    def _left(self) -> torch.Tensor:
        """``B diag``, as PEFT computes it: a product with a diagonal matrix rounds each number once."""
        norms: torch.Tensor = self.a.norm(dim=1).clamp(min=LEAST_NORM) * self.b.norm(dim=0).clamp(min=LEAST_NORM)
        return self.b * (self.bound / len(self.a) / norms)

    @cached_property
    def _fixed_left(self) -> torch.Tensor:
        norms = _fixed_norms(self.a, 1).clamp(min=LEAST_NORM) * _fixed_norms(self.b, 0).clamp(min=LEAST_NORM)
        left: torch.Tensor = self.b.double() * (self.bound.double() / len(self.a) / norms)
        return left.float()


def _fixed_norms(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the norms along `dim`, fp64, with the same bits on every machine: squares are summed as whole numbers."""
    import torch

    squares = matrix.double().square()
    exponent = torch.frexp(squares.amax(dim, keepdim=True)).exponent.long() - SQUARE_BITS
    step = ((exponent.clamp(min=-1022) + 1023) << 52).view(torch.float64)
    total = (squares / step).round().long().sum(dim)
    norms: torch.Tensor = (total.double() * step.squeeze(dim)).sqrt()
    return norms
