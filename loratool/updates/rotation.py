"""Rotations of the inputs of W by a block-diagonal D: W' = s * (D W^T)^T, with a factor for each output where a kind has one.

D is made from skew-symmetric matrices Q by Cayley's transform, (I - Q)(I + Q)^-1, or by the beginning of its Neumann series.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from typing import TYPE_CHECKING, Final

from loratool.errors import AdapterError
from loratool.updates.low_rank import FIXED_ROWS, fixed_product
from loratool.updates.relative import SingularError

if TYPE_CHECKING:
    import torch

TRIED_INPUTS: Final = 4096
TRIED_ROWS: Final = 64
"""The largest product that is tried to learn how the BLAS orders its sums."""


class Rotation:
    """The blocks of D, fp32, (blocks, n, n); one block serves for all if it `shares`. `inverse` returns those of D^-1, fp64."""

    def __init__(
        self, blocks: torch.Tensor, inverse: Callable[[], torch.Tensor], factors: torch.Tensor | None = None,
        *, shares: bool = False,
    ) -> None:  # fmt: skip
        self._blocks, self._inverse, self._factors, self._shares = blocks, inverse, factors, shares
        self._dense: torch.Tensor | None = None

    def change(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        """Rotate a block. Each block of D is multiplied alone where that gives the bits of the whole product."""
        import torch

        blocks = self._spread(self._blocks, block.shape[1])
        count, n, _ = blocks.shape
        if block.is_cuda or blocks_have_the_bits(n, block.shape[1]):
            inputs = block.view(-1, count, n).permute(1, 2, 0)
            rotated = torch.bmm(blocks, inputs, out=scratch.view(count, n, len(block))).permute(2, 0, 1)
            block.view(-1, count, n).copy_(rotated)
        else:
            block.copy_(torch.mm(self._whole(block.shape[1]), block.T).T)
        if self._factors is not None:
            block.mul_(self._factors[rows.start : rows.stop])

    def restore(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        import torch

        if self._factors is not None:
            factors = self._factors[rows.start : rows.stop]
            block.div_(torch.where(factors == 0, torch.ones_like(factors), factors))
        inverse = self._spread(self._inverted, block.shape[1])
        count, n, _ = inverse.shape
        step = len(block) if block.is_cuda else FIXED_ROWS
        for start in range(0, len(block), max(step, 1)):
            few = block[start : start + step]
            cut = few.view(-1, count, n)
            cut.copy_(fixed_product(cut.permute(1, 0, 2), inverse.transpose(1, 2)).permute(1, 0, 2))

    def _whole(self, inputs: int) -> torch.Tensor:
        """Return D, (inputs, inputs)."""

        if self._dense is None:
            self._dense = whole_of(self._spread(self._blocks, inputs))
        return self._dense

    @cached_property
    def _inverted(self) -> torch.Tensor:
        return self._inverse()

    def _spread(self, blocks: torch.Tensor, inputs: int) -> torch.Tensor:
        count, n, _ = blocks.shape
        if self._shares and inputs % n == 0:
            return blocks.expand(inputs // n, n, n)
        if count * n != inputs:
            raise AdapterError(f"blocks of {n} inputs do not divide a matrix of {inputs} inputs; is it the right base?")
        return blocks


@cache
def blocks_have_the_bits(n: int, inputs: int) -> bool:
    """Return whether products of single blocks (n, n) on this CPU have the bits of the product of the whole D.

    They do if the BLAS does not end a partial sum inside a block; a matrix of as many inputs, or of `TRIED_INPUTS`, is tried.
    """
    import torch

    count = max(1, min(inputs, TRIED_INPUTS) // n)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(count, n, n, generator=generator)
    rows = torch.randn(TRIED_ROWS, count * n, generator=generator)
    whole = torch.mm(whole_of(blocks), rows.T)
    alone = torch.bmm(blocks, rows.view(-1, count, n).permute(1, 2, 0))
    return torch.equal(alone.reshape(count * n, -1), whole)


def whole_of(blocks: torch.Tensor) -> torch.Tensor:
    """Return the block-diagonal matrix of blocks (count, n, n)."""
    count, n, _ = blocks.shape
    whole = blocks.new_zeros(count, n, count, n)
    whole.diagonal(dim1=0, dim2=2).copy_(blocks.permute(1, 2, 0))
    return whole.view(count * n, count * n)


def cayley(q: torch.Tensor) -> torch.Tensor:
    """Return ``(I - Q)(I + Q)^-1`` of skew-symmetric matrices, (blocks, n, n) fp32, as PEFT computes it.

    Raises:
        SingularError: numbers are so large that ``I + Q`` has no inverse in fp32.
    """
    import torch

    identity = torch.eye(q.shape[-1], device=q.device).expand_as(q)
    solved, problems = torch.linalg.solve_ex(identity + q, identity - q, left=False)
    if bool(problems.any()):
        raise SingularError
    found: torch.Tensor = solved
    return found


def cayley_inverse(q: torch.Tensor) -> torch.Tensor:
    """Return the inverse of `cayley`, fp64, with the same bits on every machine.

    ``(I + Q)(I - Q)^-1`` is ``2 (I - Q)^-1 - I``.
    """
    import torch

    identity = torch.eye(q.shape[-1], dtype=torch.float64, device=q.device)
    return inverted(identity - q.double()).mul_(2).sub_(identity)


def inverted(matrices: torch.Tensor) -> torch.Tensor:
    """Return the inverses of matrices, (blocks, n, n) fp64, with the same bits on every machine.

    This is Gauss-Jordan elimination in single operations without pivots, for matrices whose symmetric part is near I.
    """
    work = matrices.clone()
    for place in range(work.shape[-1]):
        pivot = work[:, place, place].clone()
        work[:, place, place] = 1
        work[:, place] /= pivot[:, None]
        column = work[:, :, place].clone()
        column[:, place] = 0
        work[:, :, place] -= column
        row = work[:, place].clone()
        # The pivot's own column now holds what the identity would have had there.
        work -= column[:, :, None] * row[:, None, :]
    return work
