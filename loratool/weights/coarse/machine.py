"""A coarse parameter in memory: decoding its codes, and changing them so that the numbers change by a given amount."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from loratool.errors import CheckpointError, quoted
from loratool.weights.coarse.block import Block, Coding, Found, Numbers
from loratool.weights.coarse.by_chance import ByChance, off_by
from loratool.weights.coarse.by_line import ByLine
from loratool.weights.coarse.least_error import LeastError
from loratool.weights.coarse.levels import LevelTable, level_table
from loratool.weights.coarse.manner import PLAIN, Habit, Manner
from loratool.weights.coarse.tiles import Area, Scaling
from loratool.weights.code_moves import Moves
from loratool.weights.stored import StoredWeight

if TYPE_CHECKING:
    import torch

    from loratool.weights.rounding import Rounding

    Tensor = torch.Tensor


ScalingOf = Callable[[range, "tuple[Tensor, ...]"], Scaling]
"""Reads the scaling of a block of cut rows from its parts, for storages with scales among the codes."""


class LoadedCoarse:
    """A coarse parameter whose scales are in memory or lie among its codes."""

    def __init__(self, weight: StoredWeight, coding: Coding, scaling: Scaling | ScalingOf, device: str,
                 habit: Callable[[LevelTable], Habit] = ByLine) -> None:  # fmt: skip
        import torch

        self.weight = weight
        self._packing, self._scaling = coding.packing, scaling
        self._table = level_table(coding.levels, coding.packing, torch.device(device))
        self._numbers = Numbers(coding, self._table)
        self._habit = habit(self._table)
        self._by_chance, self._least_error = (
            ByChance(self._table, self._numbers),
            LeastError(self._table, self._numbers),
        )

    def decode(self, rows: range, parts: tuple[Tensor, ...], out: Tensor) -> None:
        """Decode a block to the same bits as the storage's own library."""
        block, into = self._block(rows, parts, out), out.T if self.weight.turned else out
        for few in block.strips():
            into[few.part] = self._numbers.of(block, few).view(few.area.shape)

    def encode(self, rows: range, block: Tensor, parts: tuple[Tensor, ...], rounding: Rounding) -> Moves:
        """Change the codes in `parts` so that their numbers change by `block`. A code with a change of 0 stays the same.

        The hint does not include error compensation; an undo file holds the difference.

        Raises:
            CheckpointError: a code stands for NaN.
        """
        work = self._block(rows, parts, block)
        if self._table.has_no_number(work.raw):
            raise CheckpointError(
                f"{quoted(self.weight.name)} in {quoted(self.weight.tensors[0].file)} holds NaN, to which nothing can be added; "
                "download the model again"
            )
        manner = self._habit.manner(work, rounding)
        squares = self._squares(work)
        found, hint = self._found(work, manner, rounding)
        self._put(work, found.at, found.there, rows, parts)
        return Moves(self._as_cut(found.at, work), found.jumps, squares, hint, found.cut)

    def recover(self, rows: range, block: Tensor, parts: tuple[Tensor, ...], rounding: Rounding,
                hint: bytes | None) -> None:  # fmt: skip
        """Undo `encode` as far as the same random numbers lead back."""
        work = self._block(rows, parts, block.add_(0.0))  # no -0, whose sign would count
        self._put(work, *self._habit.origins(work, rounding, hint), rows, parts)

    def doubt(self, stored: tuple[Tensor, ...], predicted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        import torch

        return tuple(torch.zeros_like(part) for part in stored)

    def _block(self, rows: range, parts: tuple[Tensor, ...], change: Tensor) -> Block:
        """Return some rows of the cut matrix as a block of outputs and inputs. It shares `change` unless it is turned."""
        raw, turned = self._packing.open(rows, parts), self.weight.turned
        others = range(self.weight.columns)
        if turned:
            raw = raw.view(len(rows), -1).T.contiguous().view(-1)
        elif rows.start % self.weight.row_step:
            raise CheckpointError(f"{quoted(self.weight.name)} was cut inside a byte; the undo file is damaged")
        return Block(
            area=Area(others, rows) if turned else Area(rows, others),
            lines=1 if turned else 0,
            raw=raw,
            change=change.T.contiguous() if turned else change,
            scaling=self._scaling if isinstance(self._scaling, Scaling) else self._scaling(rows, parts),
            per_byte=self._packing.per_byte,
        )

    def _found(self, block: Block, manner: Manner, rounding: Rounding) -> tuple[Found, bytes]:
        """Return the codes that change, and the hint that undoing needs."""
        feedback = rounding.feedback_for(block.area.columns)
        if feedback is not None:
            found, short = self._least_error.found(block, manner, feedback)
            return found, manner.hint if short or manner.carriers is None else PLAIN
        outputs, by_block = rounding.outputs, self._habit.by_block
        if outputs is not None and block.lines == 1:
            outputs.begin()  # a turned block has all outputs, for inputs that were not seen before
        if outputs is not None and manner.passes is not False:
            return self._by_chance.found_with_feedback(block, manner, outputs, by_block=by_block), manner.hint
        found = self._by_chance.found(block, manner)
        if outputs is not None and by_block:
            outputs.leave(block.area.rows, off_by(block.change, found.at, found.jumps))
        elif outputs is not None:
            outputs.skip(block.area.rows)
        return found, manner.hint

    def _put(self, block: Block, at: Tensor, there: Tensor, rows: range, parts: tuple[Tensor, ...]) -> None:
        """Write the codes of the places `there` into the parts, at the positions `at` of the block."""
        self._table.put(block.raw, at, there)
        raw = block.raw if block.lines == 0 else block.raw.view(block.area.shape).T.contiguous().view(-1)
        self._packing.close(rows, parts, raw)

    def _as_cut(self, at: Tensor, block: Block) -> Tensor:
        """Convert positions in a block to positions in the rows as they are cut."""
        import torch

        if block.lines == 0:
            return at
        rows, columns = block.area.shape
        row = torch.div(at, columns, rounding_mode="floor")
        return at.sub(row * columns).mul_(rows).add_(row)

    def _squares(self, block: Block) -> float:
        """Return the sum of squares of a block's numbers, without the storage's roundings."""
        import torch

        scaling = block.scaling
        by_row = scaling.tiles.by_row(scaling.scales, block.area)
        if block.lines == 0 and scaling.base is None and by_row is not None and by_row[1] % block.per_byte == 0:
            scales, width = by_row
            here = self._numbers.per_level(scales).reshape(-1)
            return float(self._table.squares(block.raw, width).mul_(here).mul_(here).sum(dtype=torch.float64))
        numbers = (self._numbers.unrounded(block, few).square_().sum(dtype=torch.float64) for few in block.strips())
        return float(sum(numbers))
