"""The updates of MiSS (Kang and Yin 2024, arXiv:2409.15371), formerly Bone: one small matrix B is added to W again and again.

`Miss` repeats B (r, m) over W: ``D[o, i] = B[i mod r, o mod m]``, where m is the number of outputs, or a divisor of it in the
mode ``mini``. `MissBat`, the mode ``bat``, adds ``W B + B`` to each block of r outputs and r inputs; each row of blocks has its
own B (r, r).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Self

from loratool.errors import AdapterError, quoted
from loratool.updates.additive import Additive, Delta
from loratool.updates.low_rank import fixed_product
from loratool.updates.relative import Relative
from loratool.updates.shapes import ANY
from loratool.updates.zeros import only_zeros

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss(Additive):
    """Adds B (r, m), repeated. `size` is the shape of W as far as it is known; `mini` the mode."""

    mini: bool
    size: tuple[int, int] = (ANY, ANY)
    scalable: ClassVar[bool] = False

    @property
    def rank(self) -> int:
        return self.tensors["B"].shape[0]

    @property
    def kind(self) -> str:
        return f"miss r={self.rank}"

    @property
    def shape(self) -> tuple[int, int]:
        return (self.size[0] if self.mini else self.tensors["B"].shape[1]), self.size[1]

    @property
    def undivided(self) -> bool:
        return self.mini

    def sized(self, shape: tuple[int, ...]) -> Self:
        """Return the update of a matrix of this shape; raise AdapterError if B cannot be repeated over it."""
        outputs, inputs = shape
        if self.rank > inputs or outputs % self.tensors["B"].shape[1]:
            raise _unfit(self, shape)
        return replace(self, size=(outputs, inputs))

    def delta(self, numbers: Mapping[str, torch.Tensor]) -> Delta:
        """Return D from B."""
        return Repeated(numbers["B"].T.contiguous())


@dataclass(frozen=True, slots=True)
class Repeated:
    """A matrix (outputs, inputs) that is repeated over W."""

    tile: torch.Tensor

    def part(self, outputs: slice, inputs: slice) -> torch.Tensor:
        import torch

        rows, columns = (
            torch.arange(span.start, span.stop, device=self.tile.device) % size
            for span, size in zip((outputs, inputs), self.tile.shape, strict=True)
        )
        return self.tile[rows].index_select(1, columns)

    def fixed(self, outputs: slice, inputs: slice) -> torch.Tensor:
        return self.part(outputs, inputs)


@dataclass(frozen=True, slots=True)
class MissBat(Relative):
    """Adds ``W B + B`` in each block of r outputs and r inputs, with B (out_features / r, r, r)."""

    needs_outputs: ClassVar[bool] = True

    @property
    def rank(self) -> int:
        return self.tensors["B"].shape[1]

    @property
    def kind(self) -> str:
        return f"miss bat r={self.rank}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensors["B"].shape[0] * self.rank, ANY

    def sized(self, shape: tuple[int, ...]) -> Self:
        """Return itself; raise AdapterError if the inputs of a matrix of this shape are not divided into blocks."""
        if shape[1] % self.rank:
            raise _unfit(self, shape)
        return self

    def vanishes(self) -> bool:
        """Return whether all numbers of B are zero."""
        return only_zeros(self.tensors["B"])

    def changer(self, numbers: Mapping[str, torch.Tensor], *, transposed: bool) -> Blocks:
        """Return the blocks. A plan refuses the transpose."""
        assert not transposed
        return Blocks(numbers["B"])


@dataclass(frozen=True)
class Blocks:
    """B (out_features / r, r, r), fp32."""

    b: torch.Tensor

    def change(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        """Add ``W B + B`` in PEFT's order: one product for each block, of which a part has the rows of the whole."""
        groups, offset = self._groups(rows)
        few, r = self.b[groups], self.b.shape[1]
        padded = block.new_zeros(len(few) * r, block.shape[1])
        padded[offset : offset + len(block)] = block
        blocks = padded.view(len(few), r, -1, r).permute(2, 0, 1, 3)
        added = (blocks @ few + few).permute(1, 2, 0, 3).reshape(padded.shape)
        block.add_(added[offset : offset + len(block)])

    def restore(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        """Subtract B, and multiply by the inverse of ``I + B``. A block that has none stays as it is."""
        groups, offset = self._groups(rows)
        r, start = self.b.shape[1], 0
        for number in range(groups.start, groups.stop):
            first = offset if number == groups.start else 0
            stop = min(start + r - first, len(block))
            part = block[start:stop].view(stop - start, -1, r)
            part.sub_(self.b[number, first : first + stop - start][:, None])
            lost = fixed_product(part.reshape(-1, r), self._undone[number])
            part.copy_(part.double() - lost.view(part.shape))
            start = stop

    def _groups(self, rows: range) -> tuple[slice, int]:
        """Return the numbers of the rows of blocks that `rows` touch, and where in the first of them they begin."""
        r = self.b.shape[1]
        return slice(rows.start // r, -(-rows.stop // r)), rows.start % r

    @cached_property
    def _undone(self) -> torch.Tensor:
        """``I - (I + B)^-1`` of each block, fp64, eliminated in a fixed order; 0 where there is no inverse."""
        import torch

        count, r, _ = self.b.shape
        unit = torch.eye(r, dtype=torch.float64, device=self.b.device).expand(count, r, r)
        left, right = unit + self.b.double(), unit.clone()
        for step in range(r):
            pivot = left[:, step, step, None].clone()
            left[:, step] /= pivot
            right[:, step] /= pivot
            factors = left[:, :, step, None].clone()
            factors[:, step] = 0
            right -= factors * right[:, step, None]
            left -= factors * left[:, step, None]
        known = right.isfinite().all(2).all(1)[:, None, None]
        return torch.where(known, unit - right, torch.zeros_like(right))


def _unfit(update: Miss | MissBat, shape: tuple[int, ...]) -> AdapterError:
    info = update.tensors["B"]
    return AdapterError(
        f"{quoted(info.name)} in {quoted(info.file)} has shape {list(info.shape)}, which cannot be repeated over a matrix of "
        f"shape {list(shape)}; is it the right base?"
    )
