"""A block of a coarse parameter that is to change, and the arithmetic from its codes to numbers."""

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
    """The definition of a storage's codes.

    Attributes:
        levels: the values of the codes.
        packing: the layout of codes in bytes.
        dtype: the dtype that numbers are finally rounded to.
        unit: an fp32 factor of every product of a level and its scale.
        product: the dtype that the product is rounded to before offsets are added; None for fp32.
    """

    levels: Levels
    packing: Packing
    dtype: Dtype
    unit: float = 1.0
    product: Dtype | None = None


@dataclass(frozen=True)
class Numbers:
    """The storage's own exact arithmetic: the numbers of codes, with every rounding in order."""

    coding: Coding
    table: LevelTable

    def of(self, block: Block, few: Strip) -> Tensor:
        """Return the numbers of a strip of a block, flat, in the dtype of the coding."""
        values = self.table.values(block.bytes(few), few.area.count)
        return self._finished(block.scaling.offset(few.area, self._rounded(block.scaling.products(few.area, values))))

    def unrounded(self, block: Block, few: Strip) -> Tensor:
        """Return the numbers of a strip of a block in fp32, without any rounding of the storage."""
        values, scaling = self.table.values(block.bytes(few), few.area.count), block.scaling
        numbers = scaling.tiles.times(self.per_level(scaling.scales), few.area, values)
        return numbers if scaling.base is None else numbers.add_(scaling.spread(scaling.base, few.area))

    def at(self, places: Tensor, scaling: Picked) -> Tensor:
        """Return the numbers of the codes at `places`, int32, under these scales: fp32."""
        values = self.table.sorted.index_select(0, places)
        if scaling.zeros is not None:
            values = values.sub_(scaling.zeros)
        products = self._rounded(values.mul_(scaling.scales))
        return self._finished(products if scaling.offsets is None else products.add_(scaling.offsets)).float()

    def per_level(self, scales: Tensor) -> Tensor:
        """Return the change of a number per level under these scales."""
        return scales if self.coding.unit == 1 else scales * self.coding.unit

    def _rounded(self, products: Tensor) -> Tensor:
        """Round products of levels and scales as the storage does before it adds offsets. May change `products` in place."""
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
    """Some rows and columns of a parameter. Rows are outputs and columns are inputs, whatever the orientation in the file.

    Attributes:
        area: the rows and columns.
        lines: the axis of the rows of the matrix that is cut into blocks: 0, or 1 if the parameter is turned.
        raw: uint8, the bytes of the codes.
        change: (rows, columns) fp32, the change to make, or the one that was made.
        scaling: the scales of the block.
        per_byte: number of codes in a byte of `raw`.
    """

    area: Area
    lines: int
    raw: Tensor
    change: Tensor
    scaling: Scaling
    per_byte: int

    def strips(self) -> Iterator[Strip]:
        """Yield the block in strips that begin at whole bytes. On a device other than a CPU it is one strip."""
        return self.area.strips(self.per_byte if self.raw.device.type == "cpu" else None)

    def bytes(self, few: Strip) -> Tensor:
        """Return the bytes of the codes of a strip."""
        return self.raw[few.bytes(self.per_byte)]

    def shifts(self, few: Strip) -> Tensor:
        """Return the change of a strip in units of levels, as a new flat tensor."""
        return self.scaling.tiles.times(self.scaling.per_scale, few.area, self.change[few.part].view(-1))

    @property
    def line_count(self) -> int:
        return self.area.shape[self.lines]

    def by_line(self, each: Tensor) -> Tensor:
        """Reshape one number per line so that it broadcasts with (rows, columns)."""
        return each[:, None] if self.lines == 0 else each[None, :]


@dataclass(frozen=True, slots=True)
class Found:
    """The codes of a block that change.

    Attributes:
        at: (n,) int64, their positions in the flattened block.
        there: (n,) int32, the places of their new levels.
        jumps: (n,) fp32, the changes of their numbers.
        cut: number of codes that stopped at an outermost level although their rounding would have gone further.
    """

    at: Tensor
    there: Tensor
    jumps: Tensor
    cut: int = 0
