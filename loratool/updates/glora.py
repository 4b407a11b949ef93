"""The update of GLoRA (Chavan et al. 2023, arXiv:2306.07967, equation 11): W' = W + (W * A + B), and b' = b + (b * D + E).

In PEFT each of A, B, D and E is a product ``Xd Xu``, a vector, a number or nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratool.updates.low_rank import LoadedLowRank
from loratool.updates.relative import Relative

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Glora(Relative):
    """A and B, each as ``Xd`` (out_features, r) and ``Xu`` (r, in_features), or as ``X``, (out_features, 1) or (1,)."""

    size: tuple[int, int]

    @property
    def kind(self) -> str:
        return "glora"

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    def changer(self, numbers: Mapping[str, torch.Tensor], *, transposed: bool) -> Shifts:
        """Return A and B."""
        return Shifts(Term(numbers, "A", transposed=transposed), Term(numbers, "B", transposed=transposed))


@dataclass(frozen=True, slots=True)
class GloraBias(Relative):
    """D and E, each as ``X``, (out_features,) or (1,)."""

    size: tuple[int, ...]
    only_if_present: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        return "glora"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    def changer(self, numbers: Mapping[str, torch.Tensor], *, transposed: bool) -> Shifts:
        """Return D and E. A stored vector is one row."""
        return Shifts(Term(numbers, "D", transposed=False), Term(numbers, "E", transposed=False))


class Term:
    """A, B, D or E: numbers that are the same in each row or column, or a product."""

    def __init__(self, numbers: Mapping[str, torch.Tensor], name: str, *, transposed: bool) -> None:
        x = numbers.get(f"{name}.X")
        self._fixed = x if x is None or x.ndim == 1 else x.T if transposed else x
        pair = [numbers.get(f"{name}.{part}") for part in ("Xu", "Xd")]
        self._product = None if pair[0] is None or pair[1] is None else LoadedLowRank(pair[0], pair[1], 1.0, transposed)

    def of(self, rows: range, out: torch.Tensor) -> torch.Tensor:
        """Write its numbers in these rows to `out`, in PEFT's order."""
        if self._product is not None:
            self._product.multiply(rows, out)
            return out
        return self._spread(rows, out)

    def exact(self, rows: range, out: torch.Tensor) -> torch.Tensor:
        """Write the same numbers to `out`, with the same bits on every machine."""
        if self._product is not None:
            self._product.revert(out.zero_(), rows, out.new_empty(out.shape))
            return out.neg_()
        return self._spread(rows, out)

    def _spread(self, rows: range, out: torch.Tensor) -> torch.Tensor:
        if self._fixed is None:
            return out.zero_()
        tall = self._fixed.ndim == 2 and len(self._fixed) > 1
        return out.copy_(self._fixed[rows.start : rows.stop] if tall else self._fixed)


class Shifts:
    """A factor and a number for each element: ``w + (w * factor + number)``."""

    def __init__(self, factors: Term, numbers: Term) -> None:
        self._factors, self._numbers = factors, numbers

    def change(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        added = self._factors.of(rows, scratch).mul_(block)
        block.add_(added.add_(self._numbers.of(rows, block.new_empty(block.shape))))

    def restore(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        """Subtract the numbers and divide by 1 plus the factors. What a factor of -1 took stays lost."""
        import torch

        block.sub_(self._numbers.exact(rows, scratch))
        grown = self._factors.exact(rows, scratch).add_(1)
        block.div_(torch.where(grown == 0, torch.ones_like(grown), grown))
