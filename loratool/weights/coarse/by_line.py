"""The habit of coarse storages: each row, as it lies in the file, is rounded as its own numbers say.

Where the steps of a row are no longer than its change it is rounded to nearest: that loses nothing of a change whose numbers are
spread over several steps, and makes less noise. Elsewhere nearest would lose the change, and chance decides. The result does not
depend on how the parameter is cut into blocks.
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
    """Rounds each line of a block, a row of the matrix that is cut, by itself."""

    by_block = False

    def __init__(self, table: LevelTable) -> None:
        self._table = table

    def manner(self, block: Block, rounding: Rounding) -> Manner:
        """The hint has a number for each line: 1 for those rounded to nearest, or one 0 where there are none."""
        mean_steps, nearest = self._measured(block)
        passes = mean_steps <= LARGEST_CHANGE
        count = int(passes.count_nonzero())
        return Manner(
            self._words(block, rounding, nearest),
            passes=block.by_line(passes) if 0 < count < len(passes) else count > 0,
            hint=nearest.int().cpu().numpy().tobytes() if nearest.any() else PLAIN,
        )

    def origins(self, block: Block, rounding: Rounding, hint: bytes | None) -> tuple[Tensor, Tensor]:
        """A code came from itself where the same chance leaves it there; else from where the opposite chance leads it back."""
        import torch

        shift = torch.cat([block.shifts(few) for few in block.strips()])
        noise = noise_of(self._words(block, rounding, self._nearest(block, hint)))
        places = self._table.places(block.raw, block.area.count).int()
        at = true_places(self._table.moved_where_shifted(places, shift, noise) != places)
        places, shift, noise = (each.index_select(0, at) for each in (places, shift, noise))
        return at, self._table.moved(places, shift.neg_(), noise.neg_().add_(1))

    def _words(self, block: Block, rounding: Rounding, nearest: Tensor) -> Tensor:
        """Chance for each code of a block, int16, flat."""
        lines = (block.area.rows, block.area.columns)[block.lines]
        words = rounding.words_of_rows(lines, block.area.shape[1 - block.lines], block.raw.device)
        words = words if block.lines == 0 else words.T
        if nearest.any():
            words = words * block.by_line(~nearest)
        return words.reshape(-1)

    def _nearest(self, block: Block, hint: bytes | None) -> Tensor:
        """The lines that were rounded to nearest: as the hint says, or without it as the change does."""
        import torch

        if hint is None:
            return self._measured(block)[1]
        if len(hint) not in (4, 4 * block.line_count):
            raise RestoreError("a block of the undo file is damaged")
        flags = torch.frombuffer(bytearray(hint), dtype=torch.int32).to(block.raw.device) != 0
        return flags.expand(block.line_count)

    def _measured(self, block: Block) -> tuple[Tensor, Tensor]:
        """By how many mean steps each line changes on average; and which lines' longest steps are no longer than their change."""
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
