"""The habit of coarse storages: the numbers of each row, as it lies in the file, decide how the row is rounded.

A row whose steps are not longer than its change is rounded to nearest. That loses nothing of a change that spans several steps,
and makes less noise. In other rows, nearest would lose the change, so rounding is stochastic. The result does not depend on how
the parameter is cut into blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratool.errors import RestoreError
from loratool.weights.coarse.block import Block
from loratool.weights.coarse.levels import LevelTable, true_places
from loratool.weights.coarse.manner import LARGEST_CHANGE, PLAIN, Manner
from loratool.weights.rounding import noise_of

if TYPE_CHECKING:
    import torch

    from loratool.weights.rounding import Rounding

    Tensor = torch.Tensor


class ByLine:
    """Rounds each line of a block by itself. A line is a row of the matrix that is cut."""

    by_block = False

    def __init__(self, table: LevelTable) -> None:
        self._table = table

    def manner(self, block: Block, rounding: Rounding) -> Manner:
        """Return the manner of a block. Its hint is int32, 1 for each line rounded to nearest, or a single 0 if none is."""
        mean_steps, nearest = self._measured(block)
        passes = mean_steps <= LARGEST_CHANGE
        count = int(passes.count_nonzero())
        return Manner(
            self._words(block, rounding, nearest),
            passes=block.by_line(passes) if 0 < count < len(passes) else count > 0,
            hint=nearest.int().cpu().numpy().tobytes() if nearest.any() else PLAIN,
        )

    def origins(self, block: Block, rounding: Rounding, hint: bytes | None) -> tuple[Tensor, Tensor]:
        """Return the codes that came from elsewhere: those that the same random numbers would move now.

        Their origin is where the opposite random numbers lead them back to.
        """
        import torch

        shift = torch.cat([block.shifts(few) for few in block.strips()])
        noise = noise_of(self._words(block, rounding, self._nearest(block, hint)))
        places = self._table.places(block.raw, block.area.count).int()
        at = true_places(self._table.moved_where_shifted(places, shift, noise) != places)
        places, shift, noise = (each.index_select(0, at) for each in (places, shift, noise))
        return at, self._table.moved(places, shift.neg_(), noise.neg_().add_(1))

    def _words(self, block: Block, rounding: Rounding, nearest: Tensor) -> Tensor:
        """Return a random word for each code of a block, int16, flat; 0 in lines that are rounded to nearest."""
        lines = (block.area.rows, block.area.columns)[block.lines]
        words = rounding.words_of_rows(lines, block.area.shape[1 - block.lines], block.raw.device)
        words = words if block.lines == 0 else words.T
        if nearest.any():
            words = words * block.by_line(~nearest)
        return words.reshape(-1)

    def _nearest(self, block: Block, hint: bytes | None) -> Tensor:
        """Return the lines that were rounded to nearest: from the hint, or without it from the change."""
        import torch

        if hint is None:
            return self._measured(block)[1]
        if len(hint) not in (4, 4 * block.line_count):
            raise RestoreError("a block of the undo file is damaged")
        flags = torch.frombuffer(bytearray(hint), dtype=torch.int32).to(block.raw.device) != 0
        return flags.expand(block.line_count)

    def _measured(self, block: Block) -> tuple[Tensor, Tensor]:
        """Measure the change of each line.

        Returns:
            Its mean in units of mean steps, fp32; and whether its root mean square is at least the line's longest step, bool.
        """
        across, shape = 1 - block.lines, block.area.shape
        steps, squares = block.change.new_zeros(2, shape[block.lines])
        for few in block.strips():
            lines = few.part if block.lines == 0 else slice(None)
            steps[lines] += block.shifts(few).abs_().view(few.area.shape).sum(across)
            squares[lines] += block.change[few.part].square().sum(across)
        length = max(shape[across], 1)
        longest = block.scaling.tiles.largest(block.scaling.sizes, block.area, across) * self._table.longest
        size = squares.div_(length).sqrt_()
        return steps.mul_(self._table.per_mean_step / length), (size >= longest) & (size > 0) & size.isfinite()
