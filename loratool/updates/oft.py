"""The update of OFT (Qiu et al. 2023, arXiv:2306.07280) since PEFT 0.16: a rotation of blocks of inputs.

Each block of D is made from a skew-symmetric Q, of which the adapter has the upper triangle: by Cayley's transform, or in "OFTv2"
(arXiv:2506.19847, section 4) by the beginning of its Neumann series, ``I + 2Q + 2Q^2 + ...``, whose last term PEFT takes once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, quoted
from loratool.updates.low_rank import fixed_product
from loratool.updates.relative import Relative, refuse_transposed
from loratool.updates.rotation import Rotation, cayley, cayley_inverse, inverted
from loratool.updates.shapes import ANY

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Oft(Relative):
    """Rotates blocks of n inputs by the upper triangles R, (blocks, n (n - 1) / 2).

    With `shares`, R has one block for all inputs. `terms` is the number of terms of the Neumann series, or None for Cayley's
    transform.
    """

    terms: int | None = None
    shares: bool = False
    needs_outputs: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        return f"oft n={self.n}"

    @property
    def n(self) -> int:
        return side_of(self.tensors["R"])

    @property
    def shape(self) -> tuple[int, ...]:
        return ANY, ANY if self.shares else self.tensors["R"].shape[0] * self.n

    def sized(self, shape: tuple[int, ...]) -> Self:
        """Return itself; raise AdapterError if a shared block does not divide the inputs of a matrix of this shape."""
        if self.shares and shape[1] % self.n:
            tensor = self.tensors["R"]
            raise AdapterError(
                f"{quoted(tensor.name)} in {quoted(tensor.file)} has blocks of {self.n} inputs, which do not divide the "
                f"{shape[1]} of the base; is it the right base?"
            )
        return self

    def changer(self, numbers: Mapping[str, torch.Tensor], *, transposed: bool) -> Rotation:
        """Return the rotation."""
        import torch

        refuse_transposed(self, transposed=transposed)
        r, n = numbers["R"], self.n
        q = r.new_zeros(len(r), n, n)
        upper = torch.triu_indices(n, n, 1, device=r.device)
        q[:, upper[0], upper[1]] = r
        q = q - q.transpose(1, 2)
        if self.terms is None:
            return Rotation(cayley(q), lambda: cayley_inverse(q), shares=self.shares)
        terms = self.terms
        return Rotation(neumann(q, terms), lambda: neumann_inverse(q, terms), shares=self.shares)


def side_of(triangles: TensorInfo) -> int:
    """Return n of upper triangles with n (n - 1) / 2 numbers each, or 0 if there is none."""
    count = triangles.shape[-1]
    n = (1 + math.isqrt(1 + 8 * count)) // 2
    return n if n * (n - 1) == 2 * count else 0


def neumann(q: torch.Tensor, terms: int) -> torch.Tensor:
    """Return the first `terms` terms of the series for matrices Q, (blocks, n, n) fp32, as PEFT adds them."""
    import torch

    total = torch.eye(q.shape[-1], device=q.device, dtype=q.dtype).repeat(len(q), 1, 1)
    if terms > 1:
        total.add_(q, alpha=2.0)
    if terms > 2:
        power = torch.bmm(q, q)
        total.add_(power, alpha=2.0)
        for _ in range(3, terms - 1):
            power = torch.bmm(power, q)
            total.add_(power, alpha=2.0)
        total.add_(torch.bmm(power, q))
    return total


def neumann_inverse(q: torch.Tensor, terms: int) -> torch.Tensor:
    """Return the inverse of `neumann`, fp64, with the same bits on every machine."""
    import torch

    total = torch.eye(q.shape[-1], device=q.device, dtype=torch.float64).repeat(len(q), 1, 1)
    if terms > 1:
        total += 2 * q.double()
    if terms > 2:
        power = fixed_product(q, q)
        total += 2 * power
        for _ in range(3, terms - 1):
            power = fixed_product(power, q)
            total += 2 * power
        total += fixed_product(power, q)
    return inverted(total)
