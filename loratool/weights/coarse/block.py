"""A block of a coarse parameter that is to change, and how its codes become numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from loratool.checkpoint.dtypes import Dtype
from loratool.weights.coarse.levels import Levels, LevelTable
from loratool.weights.coarse.packing import Packing
from loratool.weights.coarse.tiles import Area, Picked, Scaling, Strip

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Coding:
    """How the codes of a storage become numbers.

    Attributes:
        levels: what they stand for.
        packing: how they lie in bytes.
        dtype: what numbers are rounded to in the end.
        unit: what a level times its scale is multiplied by, in fp32.
        product: the dtype that the result is rounded to before offsets are added; None for fp32.
    """

    levels: Levels
    packing: Packing
    dtype: Dtype
    unit: float = 1.0
    product: Dtype | None = None


@dataclass(frozen=True)
class Numbers:
    """The storage's own exact arithmetic: the numbers that codes stand for, with every rounding in its order."""

    coding: Coding
    table: LevelTable

    def of(self, block: Block, few: Strip) -> Tensor:
        """Those of a strip of a block, flat, in the dtype of the coding."""
        values = self.table.values(block.bytes(few), few.area.count)
        return self._finished(block.scaling.offset(few.area, self._rounded(block.scaling.products(few.area, values))))

    def unrounded(self, block: Block, few: Strip) -> Tensor:
        """The same in fp32, but for all roundings."""
        values, scaling = self.table.values(block.bytes(few), few.area.count), block.scaling
        numbers = scaling.tiles.times(self.per_level(scaling.scales), few.area, values)
        return numbers if scaling.base is None else numbers.add_(scaling.spread(scaling.base, few.area))

    def at(self, places: Tensor, scaling: Picked) -> Tensor:
        """Those of codes at `places`, int32, under these scales: fp32."""
        values = self.table.sorted.index_select(0, places)
        if scaling.zeros is not None:
            values = values.sub_(scaling.zeros)
        products = self._rounded(values.mul_(scaling.scales))
        return self._finished(products if scaling.offsets is None else products.add_(scaling.offsets)).float()

    def per_level(self, scales: Tensor) -> Tensor:
        """By how much numbers change with a level, under these scales."""
        return scales if self.coding.unit == 1 else scales * self.coding.unit

    def _rounded(self, products: Tensor) -> Tensor:
        """Levels times scales, new, as they are before offsets are added."""
        if self.coding.unit != 1:
            products = products.mul_(self.coding.unit)
        return products if self._product is None else products.to(self._product).float()

    def _finished(self, numbers: Tensor) -> Tensor:
        return numbers.to(self._dtype)

    @cached_property
    def _product(self) -> torch.dtype | None:
        return None if self.coding.product is None else self.coding.product.as_torch()

    @cached_property
    def _dtype(self) -> torch.dtype:
        return self.coding.dtype.as_torch()


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows and columns of a parameter; rows are its outputs and columns its inputs, however it is stored.

    Attributes:
        area: which ones.
        lines: the axis along which lie the rows of the matrix that is cut into blocks: 0, or 1 where it is turned.
        raw: uint8, the bytes of their codes, `per_byte` codes each.
        change: fp32, (rows, columns), what is, or was, added to the numbers that these stand for.
        scaling: their scales.
    """

    area: Area
    lines: int
    raw: Tensor
    change: Tensor
    scaling: Scaling
    per_byte: int

    def strips(self) -> Iterator[Strip]:
        """The block in strips, none of which begins inside a byte; on a device that is no CPU it is one."""
        return self.area.strips(self.per_byte if self.raw.device.type == "cpu" else None)

    def bytes(self, few: Strip) -> Tensor:
        """The bytes of the codes of a strip."""
        return self.raw[few.bytes(self.per_byte)]

    def shifts(self, few: Strip) -> Tensor:
        """The change of a strip in units of levels: flat, new."""
        return self.scaling.tiles.times(self.scaling.per_scale, few.area, self.change[few.part].view(-1))

    @property
    def line_count(self) -> int:
        return self.area.shape[self.lines]

    def by_line(self, each: Tensor) -> Tensor:
        """A number for each line, so that it goes with (rows, columns)."""
        return each[:, None] if self.lines == 0 else each[None, :]


@dataclass(frozen=True, slots=True)
class Found:
    """Where codes of a block go.

    Attributes:
        at: (n,) int64, which ones, by their places in the flattened block.
        there: (n,) int32, the places of the levels that they come to.
        jumps: (n,) fp32, by how much their numbers change.
        cut: how many stopped at an outermost level that chance would have led farther.
    """

    at: Tensor
    there: Tensor
    jumps: Tensor
    cut: int = 0
