"""The choice of the codes that carry an update: those with the shortest steps.

A code that is rounded stochastically over a step s, to carry a change delta much smaller than s, adds noise of variance
``s |delta|``. Steps differ: a step is a block's scale times the distance of two neighbouring values of NF4, which are four times
closer at zero than at the ends. So only the codes with short steps carry the update. If `count` of a column's codes in a block
of `rows` rows carry, each carries ``rows / count`` times its own change.

The choice depends on the weights and not on the update. What a row gains in one column and loses in another is therefore like
noise, but only of variance ``delta^2``. With a quarter of the codes, total noise falls to two thirds. An update that depends on
the weights is carried by all codes, because its changes may be smaller where steps are short.

Shares are balanced by column and not by row. A column whose weights are all small has only short steps, and its input is large
in every token. Balanced by row, it would get more than its share.

All this holds for updates that are small relative to a step. The larger they are, the more codes carry, up to all of them. An
undo must choose the same codes as the merge. Both compare only elements, maxima and medians, which have the same bits on every
machine; the number of carriers is in the hint of the undo.
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
"""The share of sampled rows whose largest change is at most the one by which the level is chosen."""


@dataclass(frozen=True, slots=True)
class ShortRule:
    """The definition of short steps for changes up to a given size.

    Attributes:
        largest: the largest change of a row for which the rule holds, in units of its tiles' scales.
        short: the longest short step, in units of the row's median scale.
    """

    largest: float
    short: float


USUAL: Final = 0.9
"""The share of rows whose largest scale is at most the usual one, with which other scales are compared."""

NEGLIGIBLE: Final = 2**-7
"""The share of the usual scale below which a scale belongs to a block of zeros."""


class ShortSteps:
    """The steps of a matrix, from its table of levels and its scales.

    `rules` define which steps are short. `area` is that of the whole matrix.
    """

    def __init__(self, rules: Sequence[ShortRule], table: LevelTable, scaling: Scaling, area: Area) -> None:
        import torch

        levels = table.sorted
        self._bounds = levels.new_tensor([rule.largest for rule in rules[:-1]])
        self._short = levels.new_tensor([rule.short for rule in rules])
        steps, end = levels[1:] - levels[:-1], levels.new_full((1,), math.inf)
        self._steps = torch.cat([steps.sort().values, end])
        # The rank of a code's step up, which is the number of shorter steps; and its xor with the rank of the step down.
        up, down = (torch.searchsorted(self._steps, way).to(torch.uint8)
                    for way in (torch.cat([steps, end]), torch.cat([end, steps])))  # fmt: skip
        self._table = table
        self._up, self._turn = (table.by_byte(table.of_codes(of)) for of in (up, up ^ down))
        self._shorter_at: dict[int, Tensor] = {}
        # If a row is not a whole number of tiles, it has no scales of its own, and all tiles count the same.
        self._relative, self._unable, self._width = levels.new_ones(1, 1), None, 0
        by_row = scaling.tiles.by_row(scaling.scales, area)
        if by_row is not None:
            scales, self._width = by_row
            self._relative, self._unable = _relative(scales)

    def level(self, largest: Tensor) -> int:
        """Return the index of the rule to use. `largest` is the largest change of each sampled row, in units of scales."""
        import torch

        usual = largest.kthvalue(math.ceil(MOST_ROWS * len(largest))).values
        return int(torch.bucketize(usual, self._bounds))

    def chosen(self, rows: range, raw: Tensor, change: Tensor, level: int) -> Tensor:
        """Return which codes of these rows carry a change: int8, 1 or 0, flat.

        `raw`, uint8, are the bytes of the codes. Only the signs of `change`, fp32, matter.
        """
        import torch

        shorter = self._shorter(level)
        if len(shorter) > 1:
            shorter = shorter[rows.start : rows.stop]
        rank, turn = (self._table.look_up(of, raw, change.numel()).view(torch.int8) for of in (self._up, self._turn))
        # The sign is the highest of 32 bits, so an arithmetic shift by 31 gives -1 for negative numbers.
        rank ^= turn.bitwise_and_(change.view(-1).view(torch.int32).bitwise_right_shift(31).to(torch.int8))
        below = rank.view(*shorter.shape, -1) - shorter[:, :, None]
        return below.bitwise_right_shift_(7).neg_().view(-1)

    def gain(self, rows: range, counts: Tensor) -> Tensor:
        """Return the multiple of its own change that each carrier carries, (columns,) fp32.

        `counts` are the numbers of carriers in each column.
        """
        able: Tensor | int = len(rows)
        if self._unable is not None:
            able = len(rows) - self._unable[rows.start : rows.stop].sum(0).repeat_interleave(self._width)
        return able / counts.clamp(min=1).float()

    def _shorter(self, level: int) -> Tensor:
        """Return the number of short steps in each tile: int8, (rows, tiles per row), or (1, 1) if all count the same."""
        import torch

        if level not in self._shorter_at:
            short = self._short[level] * self._relative
            self._shorter_at[level] = torch.searchsorted(self._steps, short, right=True).to(torch.int8)
        return self._shorter_at[level]


def _relative(scales: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the median scale of each row divided by that of each tile, (rows, tiles), and a mask of tiles that cannot carry.

    Those tiles are blocks of zeros, to which double quantization gives about 1/500 of the usual scale. Their codes can change
    by next to nothing, so they are not counted. The mask is None if there are none.
    """
    import torch

    usual = scales.amax(1).kthvalue(math.ceil(USUAL * len(scales))).values
    unable = scales < (usual * NEGLIGIBLE).clamp(min=torch.finfo(torch.float32).tiny)
    if not unable.any():
        return scales.median(1, keepdim=True).values / scales, None
    middle = torch.where(unable, math.nan, scales).nanmedian(1, keepdim=True).values
    return torch.where(unable, -1.0, middle / scales), unable
