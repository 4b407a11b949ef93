"""The part of a stored parameter that one update changes, and the update at work on blocks of rows that hold some of it.

An update changes a matrix (out_features, in_features). A parameter may hold several, one after the other (query, key and value),
interleaved, stacked (experts) or transposed. Blocks are rows of the matrix that is cut (`loratool.weights.stored`), so an update
gets from each block the rows and columns that are its own, as if it had a matrix of its own. Its bits are those of that matrix.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.architecture import View
from loratool.checkpoint.blocks import BLOCK_ROWS, row_blocks
from loratool.updates import Keeping, LoadedUpdate, Measuring
from loratool.weights.stored import StoredWeight

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a region in a block of rows.

    Attributes:
        own: the rows of the region, counted from its first one.
        rows, columns: where they are in the block.
    """

    own: range
    rows: slice
    columns: slice


@dataclass(frozen=True, slots=True)
class Region:
    """Rows and columns of the matrix that is cut into blocks.

    Attributes:
        rows, columns: their numbers; interleaved ones have a step.
        transposed: whether the rows are in_features and the columns out_features.
        around: all rows from the first to the last, with those between interleaved ones.
        height, width: rows and columns of the whole matrix.
    """

    rows: range
    columns: range
    transposed: bool
    around: range
    height: int
    width: int

    @classmethod
    def of(cls, view: View, weight: StoredWeight) -> Region:
        """Return the region of the stored parameter that `view` shows. The view of a whole parameter is the whole matrix."""
        height, width = weight.rows, weight.columns
        transposed = view.transposed != weight.turned
        rows, columns = range(height), range(width)
        if view.expert is not None:
            each = height // math.prod(weight.shape[:-2])
            rows = rows[view.expert * each : (view.expert + 1) * each]
        around = rows
        if transposed or len(weight.shape) == 1:
            columns = columns[view.outputs]
        else:
            rows = rows[view.outputs]
            before = (rows.start - around.start) // rows.step * rows.step
            around = around[before : before + len(rows) * rows.step]
        return cls(rows, columns, transposed, around, height, width)

    @property
    def is_whole(self) -> bool:
        return len(self.rows) == self.height and len(self.columns) == self.width

    def within(self, rows: range) -> Part | None:
        """Return the part of the region in a block of rows, or None if there is none."""
        start, step = self.rows.start, self.rows.step
        first, last = (min(max(-(-(row - start) // step), 0), len(self.rows)) for row in (rows.start, rows.stop))
        if first >= last or not len(self.columns):
            return None
        columns = self.columns
        return Part(
            range(first, last),
            slice(start + first * step - rows.start, start + (last - 1) * step + 1 - rows.start, step),
            slice(columns.start, columns[-1] + 1, columns.step),
        )


@dataclass(frozen=True, slots=True)
class RegionalUpdate:
    """A loaded update and the region that it changes."""

    update: LoadedUpdate
    region: Region

    @property
    def keeps(self) -> bool:
        return self.update.keeps

    def touches(self, rows: range) -> bool:
        """Return whether it changes any of these rows."""
        return self.region.within(rows) is not None

    def directions(self, rows: range, *, turned: bool) -> torch.Tensor | None:
        """Return a basis of what it changes in these rows, or None if the change is not of low rank.

        It has a row for each output, (rows, r), or, if the matrix is `turned`, (columns, r); outputs outside the region get 0.
        """
        basis = self.update.inputs if turned else self.update.outputs
        if basis is None or self.region.is_whole:
            return basis
        region, part = self.region, self.region.within(rows)
        whole = basis.new_zeros(region.width if turned else len(rows), basis.shape[1])
        if turned:
            whole[region.columns.start :: region.columns.step][: len(region.columns)] = basis
        elif part is not None:
            whole[part.rows] = basis[part.own.start : part.own.stop]
        return whole

    def kept_count(self, rows: range) -> int:
        """Return the number of 32-bit numbers that `apply` returns for a block."""
        part = self.region.within(rows)
        return self.update.kept_count(part.own) if part is not None and isinstance(self.update, Keeping) else 0

    @property
    def measures_whole(self) -> bool:
        """Whether `measure` must see all blocks before the first `apply`."""
        return isinstance(self.update, Measuring) and self.update.measures_whole

    @property
    def measures_block(self) -> bool:
        """Whether `measure` must see a block before `apply` if another update comes before."""
        return isinstance(self.update, Measuring) and not self.update.measures_whole

    def overlaps(self, other: RegionalUpdate) -> bool:
        """Return whether another update may change some of the same numbers."""
        own, others = self.region.around, other.region.around
        return max(own.start, others.start) < min(own.stop, others.stop)

    def measure(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        """Show the update its part of a block of W before any update, if it depends on that."""
        part = self.region.within(rows)
        if part is not None and isinstance(self.update, Measuring):
            own = block[part.rows, part.columns].contiguous()
            self.update.measure(own, part.own, _room_for(own, scratch))

    def apply(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> bytes:
        """Change the region's part of a block of rows in place, as `LoadedUpdate.apply` does with a whole block."""
        if self.region.is_whole:
            return self.update.apply(block, rows, scratch)
        part = self.region.within(rows)
        if part is None:
            return b""
        with _own(block, part) as numbers:
            return self.update.apply(numbers, part.own, _room_for(numbers, scratch))

    def revert(self, block: torch.Tensor, rows: range, scratch: torch.Tensor, kept: bytes) -> None:
        """Revert the change of a block in place, as `LoadedUpdate.revert` does."""
        if self.region.is_whole:
            self.update.revert(block, rows, scratch, kept)
            return
        part = self.region.within(rows)
        if part is None:
            return
        with _own(block, part) as numbers:
            self.update.revert(numbers, part.own, _room_for(numbers, scratch), kept)


@contextmanager
def _own(block: torch.Tensor, part: Part) -> Iterator[torch.Tensor]:
    """Yield the numbers of a part to change in place. Where they lie apart, a copy is yielded and then copied back."""
    import torch

    numbers = block[part.rows, part.columns]
    if numbers.is_contiguous() and numbers.data_ptr() == block.data_ptr():
        yield numbers
        return
    copy = numbers.clone(memory_format=torch.contiguous_format)  # aligned, as a whole block is
    yield copy
    numbers.copy_(copy)


def _room_for(numbers: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Return the beginning of `scratch` in the shape of `numbers`."""
    return scratch.view(-1)[: numbers.numel()].view(numbers.shape)


def segments(regions: Iterable[Region], weight: StoredWeight) -> list[range]:
    """Return the rows of the cut matrix in segments that begin and end with regions, as near as blocks may begin and end."""
    ends, step = {0, weight.rows}, weight.row_step
    for region in regions:
        ends.add(region.around.start // step * step)
        ends.add(min(-(-region.around.stop // step) * step, weight.rows))
    return [range(start, stop) for start, stop in itertools.pairwise(sorted(ends))] or [range(weight.rows)]


def blocks_of(found: Iterable[range], regions: Sequence[Region], columns: int, block_bytes: int) -> Iterator[range]:
    """Cut segments into blocks, so that an update gets as many rows in a block as of a matrix of its own."""
    least = BLOCK_ROWS * math.lcm(*(region.rows.step for region in regions))
    for rows in found:
        for block in row_blocks(len(rows), columns * 4, block_bytes, least):
            yield rows[block.start : block.stop]
