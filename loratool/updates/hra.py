"""The update of HRA (Yuan et al. 2024, arXiv:2405.17484): W' = W H, with H a product of r Householder reflections.

H is ``(I - 2 u_1 u_1^T) ... (I - 2 u_r u_r^T)`` with the columns u of the adapter at length 1. If these are made orthogonal
to each other first, by Gram and Schmidt, H is ``I - 2 U U^T``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Final

from loratool.updates.low_rank import FIXED_ROWS, fixed_product
from loratool.updates.relative import Relative, refuse_transposed
from loratool.updates.shapes import ANY

if TYPE_CHECKING:
    import torch

PANEL: Final = 256
"""Number of rows of H that are reflected at a time."""


@dataclass(frozen=True, slots=True)
class Hra(Relative):
    """Reflects the inputs of W by the columns of u, (in_features, r); `orthogonal` says that they are made so."""

    orthogonal: bool = False
    needs_outputs: ClassVar[bool] = True
    scaling: ClassVar[float] = 1.0

    @property
    def kind(self) -> str:
        return f"hra r={self.rank}"

    @property
    def rank(self) -> int:
        return self.tensors["u"].shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        return ANY, self.tensors["u"].shape[0]

    def changer(self, numbers: Mapping[str, torch.Tensor], *, transposed: bool) -> Reflections:
        """Return H."""
        refuse_transposed(self, transposed=transposed)
        return Reflections(numbers["u"], orthogonal=self.orthogonal)


class Reflections:
    """H, made from the columns of u, fp32, (in_features, r). In memory it is a matrix (in_features, in_features)."""

    def __init__(self, u: torch.Tensor, *, orthogonal: bool) -> None:
        self._u, self._orthogonal = u, orthogonal

    def change(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        import torch

        block.copy_(torch.mm(block, self._h, out=scratch))

    def restore(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        """Reflect back, the last reflection first. Each is its own inverse."""
        step = len(block) if block.is_cuda else FIXED_ROWS
        for start in range(0, len(block), max(step, 1)):
            few = block[start : start + step]
            restored = few.double()
            for u in self._exact:
                restored -= 2 * fixed_product(fixed_product(restored, u), u.T)
            few.copy_(restored)

    @cached_property
    def _h(self) -> torch.Tensor:
        """H in PEFT's order, fp32."""
        import torch

        u = self._u
        h = torch.eye(len(u), device=u.device)
        if self._orthogonal:
            q = [(u[:, 0] / u[:, 0].norm()).view(-1, 1)]
            for place in range(1, u.shape[1]):
                each = u[:, place].view(-1, 1)
                for before in q:
                    each = each - (before.t() @ each) * before
                q.append((each / each.norm()).view(-1, 1))
            whole = torch.cat(q, dim=1)
            return h.sub_((2 * whole) @ whole.t())
        u = u / u.norm(dim=0)
        for place in range(u.shape[1]):
            each = u[:, place].view(-1, 1)
            for start in range(0, len(h), PANEL):
                panel = h[start : start + PANEL]
                panel.sub_((2 * panel) @ each @ each.t())
        return h

    @cached_property
    def _exact(self) -> list[torch.Tensor]:
        """The reflections in reverse order, each a matrix (in_features, k), fp64, with the same bits on every machine."""
        import torch

        columns = [each.clone() for each in self._u.double().T]
        found: list[torch.Tensor] = []
        for column in columns:
            rest = column
            for before in found if self._orthogonal else ():
                rest = rest - _dot(before, rest) * before
            found.append(rest / math.sqrt(_dot(rest, rest)))
        if self._orthogonal:
            return [torch.stack(found, 1)]
        return [each.view(-1, 1) for each in reversed(found)]


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the sum of the products of two vectors, rounded once."""
    return math.fsum((a * b).tolist())
