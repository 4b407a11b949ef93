"""Tiles, which are sets of elements with a common scale, and the scales, zeros and offsets of a parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor

STRIP: Final = 1 << 18
"""The approximate number of elements in a strip, chosen so that intermediate results stay in a processor's cache."""


@dataclass(frozen=True, slots=True)
class Area:
    """Some rows and columns of a parameter, with elements in row-major order."""

    rows: range
    columns: range

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.columns)

    @property
    def count(self) -> int:
        return len(self.rows) * len(self.columns)

    def strips(self, step: int | None) -> Iterator[Strip]:
        """Yield strips of about `STRIP` elements. Each except the last has a multiple of `step` rows; None yields one strip."""
        rows = len(self.rows) if step is None else max(step, STRIP // max(len(self.columns), 1) // step * step)
        for start in range(0, len(self.rows), max(rows, 1)):
            part = slice(start, min(start + rows, len(self.rows)))
            yield Strip(Area(self.rows[part], self.columns), part)


@dataclass(frozen=True, slots=True)
class Strip:
    """Some rows of an area.

    Attributes:
        area: the rows and columns of the parameter.
        part: the position of these rows in the whole area.
    """

    area: Area
    part: slice

    @property
    def flat(self) -> slice:
        """The position of its elements among those of the whole area."""
        columns = len(self.area.columns)
        return slice(self.part.start * columns, self.part.stop * columns)

    def bytes(self, per_byte: int) -> slice:
        """Return the position of its codes among the bytes of the whole area."""
        return slice(self.flat.start // per_byte, -(-self.flat.stop // per_byte))


class Tiles(Protocol):
    """The assignment of elements to tiles. The argument `each` has one number for every tile of the parameter, flat."""

    def times(self, each: Tensor, area: Area, flat: Tensor) -> Tensor:
        """Return the elements `flat` of an area times the number of their tile, as a new tensor."""

    def at(self, area: Area, at: Tensor) -> Tensor:
        """Return the tiles, int64, of the elements at the positions `at`, int64, of an area."""

    def largest(self, each: Tensor, area: Area, axis: int) -> Tensor:
        """Return the largest number among the tiles of each row (`axis` 1) or column (`axis` 0) of an area."""

    def by_row(self, each: Tensor, area: Area) -> tuple[Tensor, int] | None:
        """Return the numbers of whole rows, (rows, tiles per row), and the width of a tile; None if tiles do not fit rows."""


@dataclass(frozen=True, slots=True)
class FlatTiles:
    """Tiles of `size` consecutive elements in a matrix of `columns` columns. A tile may continue in the next row."""

    size: int
    columns: int

    def times(self, each: Tensor, area: Area, flat: Tensor) -> Tensor:
        first, offset = divmod(area.rows.start * self.columns, self.size)
        here = each[first : first - (-(offset + len(flat)) // self.size)]
        if offset == 0 and len(flat) % self.size == 0:
            return (flat.view(-1, self.size) * here[:, None]).view(-1)
        return flat * here.repeat_interleave(self.size)[offset : offset + len(flat)]

    def at(self, area: Area, at: Tensor) -> Tensor:
        import torch

        return torch.div(at + area.rows.start * self.columns, self.size, rounding_mode="floor")

    def largest(self, each: Tensor, area: Area, axis: int) -> Tensor:
        spread = self.times(each, area, each.new_ones(area.count))
        return spread.view(area.shape).amax(axis)

    def by_row(self, each: Tensor, area: Area) -> tuple[Tensor, int] | None:
        if self.columns % self.size:
            return None
        return each.view(-1, self.columns // self.size)[area.rows.start : area.rows.stop], self.size


@dataclass(frozen=True)
class GridTiles:
    """A grid of tiles. The row and the column of an element determine its tile.

    Attributes:
        row: number of rows in a tile, or the grid row of every row, int64.
        column: number of columns in a tile, or the grid column of every column, int64.
        wide: number of grid columns.
        first_row: the first row of the parameter that the grid covers.
    """

    row: int | Tensor
    column: int | Tensor
    wide: int
    first_row: int = 0

    def times(self, each: Tensor, area: Area, flat: Tensor) -> Tensor:
        here = self._rows_of_tiles(each, area)
        if self.wide == 1:
            return (flat.view(area.shape) * here).view(-1)
        if isinstance(self.column, int):
            first, offset = divmod(area.columns.start, self.column)
            if offset == 0 and len(area.columns) % self.column == 0:
                here = here[:, first : first + len(area.columns) // self.column]
                return (flat.view(len(area.rows), -1, self.column) * here[:, :, None]).view(-1)
        return (flat.view(area.shape) * here.index_select(1, self._columns(area, each.device))).view(-1)

    def at(self, area: Area, at: Tensor) -> Tensor:
        import torch

        columns = len(area.columns)
        row = torch.div(at, columns, rounding_mode="floor")
        tile = self._rows(area, at.device).index_select(0, row)
        if self.wide == 1:
            return tile
        column = at.sub(row.mul_(columns))
        return tile.mul_(self.wide).add_(self._columns(area, at.device).index_select(0, column))

    def largest(self, each: Tensor, area: Area, axis: int) -> Tensor:
        here, columns = self._rows_of_tiles(each, area), self._columns(area, each.device)
        if axis == 0:
            return here.amax(0).index_select(0, columns)
        first, last = columns.aminmax()
        return here[:, int(first) : int(last) + 1].amax(1)

    def by_row(self, each: Tensor, area: Area) -> tuple[Tensor, int] | None:
        if not isinstance(self.column, int) or self.wide * self.column != len(area.columns):
            return None
        return self._rows_of_tiles(each, area), self.column

    def _rows_of_tiles(self, each: Tensor, area: Area) -> Tensor:
        """Return the numbers of the tiles of each row: (rows, wide)."""
        grid = each.view(-1, self.wide)
        if isinstance(self.row, int) and self.row == 1:
            start = area.rows.start - self.first_row
            return grid[start : start + len(area.rows)]
        return grid.index_select(0, self._rows(area, each.device))

    def _rows(self, area: Area, device: torch.device) -> Tensor:
        return _tile_numbers(self.row, area.rows, self.first_row, device)

    def _columns(self, area: Area, device: torch.device) -> Tensor:
        return _tile_numbers(self.column, area.columns, 0, device)


def _tile_numbers(tile: int | Tensor, lines: range, first: int, device: torch.device) -> Tensor:
    """Return the grid row of each of these rows, or the grid column of each of these columns, int64."""
    import torch

    if not isinstance(tile, int):
        return tile[lines.start - first : lines.stop - first]
    numbers = torch.arange(lines.start - first, lines.stop - first, device=device)
    return torch.div(numbers, tile, rounding_mode="floor")


@dataclass(frozen=True)
class Scaling:
    """The scales of a parameter: the number of an element is ``scale * (level - zero) + offset``.

    Attributes:
        tiles: the elements that share a scale, zero and offset.
        scales: fp32, one per tile, flat, of either sign.
        zeros, offsets: the same; None for 0.
        base: the number of a level of 0, without roundings; None for 0.
        sizes: the magnitude of a number's change per level; 0 in tiles whose codes must not change.
        per_scale: the factor from a change of a number to a change of its level; 0 in tiles whose codes must not change.
    """

    tiles: Tiles
    scales: Tensor
    sizes: Tensor
    per_scale: Tensor
    zeros: Tensor | None = None
    offsets: Tensor | None = None
    base: Tensor | None = None

    @classmethod
    def of(cls, tiles: Tiles, scales: Tensor, *, zeros: Tensor | None = None, offsets: Tensor | None = None,
           unit: float = 1.0, still: Tensor | None = None) -> Scaling:  # fmt: skip
        """Make a scaling. `unit` is another factor of all products.

        Codes do not change in tiles that are `still`; by default, those are tiles whose scale has no reciprocal in fp32.
        """
        import torch

        true = scales if unit == 1 else scales * unit
        if still is None:
            still = true.abs() < torch.finfo(torch.float32).tiny
        base = None if zeros is None else -zeros * true
        if offsets is not None:
            base = offsets if base is None else base + offsets
        sizes, per_scale = true.abs().masked_fill_(still, 0.0), torch.where(still, 0.0, 1 / true)
        return cls(tiles, scales, sizes, per_scale, zeros, offsets, base)

    def picked(self, area: Area, at: Tensor) -> Picked:
        """Return the scales, zeros and offsets of the elements at the positions `at` of an area."""
        tile = self.tiles.at(area, at)
        zeros, offsets = (None if each is None else each.index_select(0, tile) for each in (self.zeros, self.offsets))
        return Picked(self.scales.index_select(0, tile), zeros, offsets)

    def products(self, area: Area, values: Tensor) -> Tensor:
        """Return ``scale * (level - zero)`` of an area's elements with the levels `values`, flat: a new fp32 tensor."""
        if self.zeros is not None:
            values = values - self.spread(self.zeros, area)
        return self.tiles.times(self.scales, area, values)

    def offset(self, area: Area, products: Tensor) -> Tensor:
        """Add the offsets of an area's elements to their products in place, and return these."""
        return products if self.offsets is None else products.add_(self.spread(self.offsets, area))

    def spread(self, each: Tensor, area: Area) -> Tensor:
        """Return for every element of an area the number of its tile, flat."""
        return self.tiles.times(each, area, each.new_ones(area.count))


@dataclass(frozen=True, slots=True)
class Picked:
    """The scales, zeros and offsets of some elements, one per element; None if the parameter has none."""

    scales: Tensor
    zeros: Tensor | None = None
    offsets: Tensor | None = None

    def __getitem__(self, few: slice) -> Picked:
        zeros, offsets = (None if each is None else each[few] for each in (self.zeros, self.offsets))
        return Picked(self.scales[few], zeros, offsets)
