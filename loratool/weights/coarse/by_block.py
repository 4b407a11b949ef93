"""The habit of bitsandbytes' 4-bit storages. It is kept for its bytes, so that existing merges can be made again and undone.

Each block of rows is rounded in one way, which a sample of its rows decides, and its random numbers begin anew. No row is
rounded to nearest. Codes with short steps may carry the change for the others. Undoing looks for the origin of a code at most
one level away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from loratool.errors import RestoreError
from loratool.weights.coarse.block import Block
from loratool.weights.coarse.levels import LevelTable, true_places
from loratool.weights.coarse.manner import LARGEST_CHANGE, PLAIN, Carriers, Manner
from loratool.weights.coarse.short_steps import ShortRule, ShortSteps
from loratool.weights.coarse.tiles import Area, Scaling
from loratool.weights.rounding import noise_of

if TYPE_CHECKING:
    import torch

    from loratool.weights.rounding import Rounding

    Tensor = torch.Tensor

LOOKED_AT: Final = 64
"""The fewest rows of a block that are sampled to measure its change."""


class ByBlock:
    """Rounds each block in one way. With `rules`, codes with short steps carry a small change; otherwise all codes do."""

    by_block = True

    def __init__(self, table: LevelTable, scaling: Scaling, area: Area, rules: Sequence[ShortRule]) -> None:
        """`area` is that of the whole parameter."""
        self._table = table
        self._short = ShortSteps(rules, table, scaling, area) if rules else None

    def manner(self, block: Block, rounding: Rounding) -> Manner:
        """Return the manner of a block. Its hint is the number of carriers in each column, int32, or one 0 for all codes."""
        sizes = self._sizes(block)
        words = rounding.words(block.area.rows, block.area.count, block.raw.device)
        carriers, hint = (None, PLAIN) if rounding.all_carry else self._carriers(block, sizes)
        return Manner(words, self._mean_steps(sizes) <= LARGEST_CHANGE, hint, carriers)

    def origins(self, block: Block, rounding: Rounding, hint: bytes | None) -> tuple[Tensor, Tensor]:
        """Return the codes that came from elsewhere: those that the same random numbers move here from one level away.

        The candidates of a code are its own level and the next one against the change. About one code in a hundred could have
        come from both, or came from further away; an undo file lists these.
        """
        import torch

        rows, change, table = block.area.rows, block.change, self._table
        shift = block.scaling.tiles.times(block.scaling.per_scale, block.area, change.view(-1))
        noise = noise_of(rounding.words(rows, len(shift), shift.device))
        stayed = table.places(block.raw, len(shift))
        came = (
            stayed.view(torch.int8).sub(torch.sign(shift).to(torch.int8)).clamp_(0, table.count - 1).view(torch.uint8)
        )
        from_there, from_itself = shift, shift
        if self._short is not None and hint != PLAIN and not rounding.all_carry:
            level = self._short.level(self._sizes(block).amax(1))
            chosen = self._short.chosen(rows, block.raw, shift, level)
            counts = self._counts(hint, chosen.view(change.shape))
            grown = (shift.view(change.shape) * self._short.gain(rows, counts)).view(-1)
            came_chosen = self._short.chosen(rows, table.bytes(came), shift, level)
            from_itself, from_there = (torch.where(some.view(torch.bool), grown, 0.0) for some in (chosen, came_chosen))
        came_by, left_by = (table.moved_where_shifted(places.int(), by, noise)
                            for places, by in ((came, from_there), (stayed, from_itself)))  # fmt: skip
        at = true_places((came_by == stayed) & (left_by != stayed))
        return at, came.index_select(0, at).int()

    def _sizes(self, block: Block) -> Tensor:
        """Return the magnitude of a block's change in units of levels, for sampled rows: (rows, columns) fp32."""
        change, scaling = block.change, block.scaling
        step = (
            max(1, len(change) // LOOKED_AT - 1) | 1
        )  # odd, because structure in rows, such as heads, comes in powers of two
        by_row = scaling.tiles.by_row(scaling.per_scale, block.area)
        if by_row is None:
            shifts = scaling.tiles.times(scaling.per_scale, block.area, change.view(-1))
            return shifts.view(change.shape)[::step].abs()
        each, width = by_row
        here = each[::step, :, None]
        return (change[::step].view(len(here), -1, width).abs() * here).view(len(here), -1)

    def _carriers(self, block: Block, sizes: Tensor) -> tuple[Carriers | None, bytes]:
        """Return the codes that carry a change of these `sizes`, or None for all codes, with the hint that records it."""
        import torch

        if self._short is None:
            return None, PLAIN
        level = self._short.level(sizes.amax(1))
        chosen, counts = [], torch.zeros(block.area.shape[1], device=block.raw.device)
        for few in block.strips():
            change = block.change[few.part]
            some = self._short.chosen(few.area.rows, block.bytes(few), change, level)
            counts += some.view(change.shape).float().sum(0)
            chosen.append(some)
        hint = counts.to(torch.int32).cpu().numpy().tobytes()
        return Carriers(torch.cat(chosen), self._short.gain(block.area.rows, counts)), hint

    def _counts(self, hint: bytes | None, chosen: Tensor) -> Tensor:
        """Return the number of carriers in each column: from the hint, or without it an estimate from the present codes."""
        import torch

        if hint is None:
            return chosen.sum(0, dtype=torch.int32)
        if len(hint) != 4 * chosen.shape[1]:
            raise RestoreError("a block of the undo file is damaged")
        return torch.frombuffer(bytearray(hint), dtype=torch.int32).to(chosen.device)

    def _mean_steps(self, sizes: Tensor) -> float:
        """Return the mean of changes in units of levels, divided by the mean step between levels."""
        import torch

        return float(sizes.sum(dtype=torch.float64)) / max(sizes.numel(), 1) * self._table.per_mean_step
