"""Which codes carry an update: those that have the shortest way to go.

A code that is moved by chance over a step s, to carry a change delta much smaller than s, adds noise of variance
``s |delta|``. The step is not the same for all: a block's scale times the distance of two neighbouring values of NF4, which
lie four times closer at zero than at the ends. So the update is given to those codes alone whose step is short, and each
of them carries ``rows / count`` times its share (of its column's codes in the rows at hand, `count` do). Which codes these
are depends on the weights and not on the update, so what a row gains in one column and loses in another is like noise, but of
variance ``delta^2`` only. With a quarter of the codes it is two thirds of the noise altogether.

Shares are made up for by column and not by row: a column whose weights are all small has short steps only, and that is the
column of an input that is large in every token. By row it would be given more than its share.

All that holds for updates that are small beside a step. The larger they are, the more codes take part, in the end all. Both
sides of an undo must choose alike. What they compare is elementwise, a largest element or one in the middle, the same bits
on every machine; how many codes take part is told to the one who takes the update out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loratool.weights.coarse.levels import LevelTable
from loratool.weights.coarse.tiles import Area, Scaling

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor

MOST_ROWS: Final = 0.75
"""In so many of the rows at hand the largest change is no larger than the one that the level is chosen by."""


@dataclass(frozen=True, slots=True)
class ShortRule:
    """Which steps are short.

    Attributes:
        largest: up to which largest change of a row, in units of its tiles' scales, the rule holds.
        short: how long a short step is at most, in units of the scale in the middle of the row.
    """

    largest: float
    short: float


USUAL: Final = 0.9
"""In so many rows the largest scale is no larger than the one that others are compared with."""

NEGLIGIBLE: Final = 2**-7
"""A scale below so much of that is one of a block of zeros."""


class ShortSteps:
    """The steps of a matrix, from the table of its levels and its scales; `rules` say which are short, `area` is all of it."""

    def __init__(self, rules: Sequence[ShortRule], table: LevelTable, scaling: Scaling, area: Area) -> None:
        import torch

        levels = table.sorted
        self._bounds = levels.new_tensor([rule.largest for rule in rules[:-1]])
        self._short = levels.new_tensor([rule.short for rule in rules])
        steps, end = levels[1:] - levels[:-1], levels.new_full((1,), math.inf)
        self._steps = torch.cat([steps.sort().values, end])
        # The rank of a code's step up, that is the number of shorter steps; and that xor the rank of its step down.
        up, down = (torch.searchsorted(self._steps, way).to(torch.uint8)
                    for way in (torch.cat([steps, end]), torch.cat([end, steps])))  # fmt: skip
        self._table = table
        self._up, self._turn = (table.by_byte(table.of_codes(of)) for of in (up, up ^ down))
        self._shorter_at: dict[int, Tensor] = {}
        # A row that is no whole number of tiles has no scales of its own: its tiles count alike.
        self._relative, self._unable, self._width = levels.new_ones(1, 1), None, 0
        by_row = scaling.tiles.by_row(scaling.scales, area)
        if by_row is not None:
            scales, self._width = by_row
            self._relative, self._unable = _relative(scales)

    def level(self, largest: Tensor) -> int:
        """Which of the rules holds where `largest` is the largest change of each row looked at, in units of its codes' scales."""
        import torch

        usual = largest.kthvalue(math.ceil(MOST_ROWS * len(largest))).values
        return int(torch.bucketize(usual, self._bounds))

    def chosen(self, rows: range, raw: Tensor, change: Tensor, level: int) -> Tensor:
        """Which codes of these rows take part in a change: int8, 1 or 0, flat.

        `raw`, uint8, are the bytes of the codes. Of `change`, fp32, the signs count.
        """
        import torch

        shorter = self._shorter(level)
        if len(shorter) > 1:
            shorter = shorter[rows.start : rows.stop]
        rank, turn = (self._table.look_up(of, raw, change.numel()).view(torch.int8) for of in (self._up, self._turn))
        # The sign is in the last of 32 bits, and a shift to the right by 31 leaves -1 of it.
        rank ^= turn.bitwise_and_(change.view(-1).view(torch.int32).bitwise_right_shift(31).to(torch.int8))
        below = rank.view(*shorter.shape, -1) - shorter[:, :, None]
        return below.bitwise_right_shift_(7).neg_().view(-1)

    def gain(self, rows: range, counts: Tensor) -> Tensor:
        """How many times its own change each code carries, fp32, (columns,), where `counts` of a column's codes take part."""
        able: Tensor | int = len(rows)
        if self._unable is not None:
            able = len(rows) - self._unable[rows.start : rows.stop].sum(0).repeat_interleave(self._width)
        return able / counts.clamp(min=1).float()

    def _shorter(self, level: int) -> Tensor:
        """How many steps are short in each block: int8, (rows, blocks of a row), or (1, 1) where they count alike."""
        import torch

        if level not in self._shorter_at:
            short = self._short[level] * self._relative
            self._shorter_at[level] = torch.searchsorted(self._steps, short, right=True).to(torch.int8)
        return self._shorter_at[level]


def _relative(scales: Tensor) -> tuple[Tensor, Tensor | None]:
    """The scale in the middle of each row over that of each block, (rows, blocks); and which blocks cannot carry, if any.

    Those are not counted: what they could change by is nothing beside the change. Of a block of zeros double quantization
    makes a scale of about a five hundredth of the others'.
    """
    import torch

    usual = scales.amax(1).kthvalue(math.ceil(USUAL * len(scales))).values
    unable = scales < (usual * NEGLIGIBLE).clamp(min=torch.finfo(torch.float32).tiny)
    if not unable.any():
        return scales.median(1, keepdim=True).values / scales, None
    middle = torch.where(unable, math.nan, scales).nanmedian(1, keepdim=True).values
    return torch.where(unable, -1.0, middle / scales), unable
