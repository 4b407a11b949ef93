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
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor

LEVELS: Final = ((0.01, 0.086), (0.03, 0.095), (0.1, 0.11), (math.inf, math.inf))
"""Up to which largest change of a row, in units of a block's scale, which steps are short, in units of the scale in the
middle of the row: a quarter of all, two fifths, three fifths, all (docs/nf4-merge.md)."""

MOST_ROWS: Final = 0.75
"""In so many of the rows at hand the largest change is no larger than the one that the level is chosen by."""

USUAL: Final = 0.9
"""In so many rows the largest scale is no larger than the one that others are compared with."""

NEGLIGIBLE: Final = 2**-7
"""A scale below so much of that is one of a block of zeros."""


class ShortSteps:
    """The steps of a matrix, (rows, columns): `scales` of its blocks, fp32, and the sorted `values` of its codes."""

    def __init__(self, scales: Tensor, shape: tuple[int, int], blocksize: int, values: Tensor) -> None:
        import torch

        bounds, short = zip(*LEVELS, strict=True)
        self._bounds, self._short = values.new_tensor(bounds[:-1]), values.new_tensor(short)
        steps, end = values[1:] - values[:-1], values.new_full((1,), math.inf)
        self._steps = torch.cat([steps.sort().values, end])
        # For each byte what is to be known of its two codes, the first one first, two uint8 looked up as one int16: the ranks
        # of their steps up, that is the number of shorter steps; and these xor those of their steps down.
        up, down = (torch.searchsorted(self._steps, way).to(torch.uint8)
                    for way in (torch.cat([steps, end]), torch.cat([end, steps])))  # fmt: skip
        self._up, self._turn = (torch.cartesian_prod(of, of).view(torch.int16).view(256) for of in (up, up ^ down))
        self._blocksize = blocksize
        self._shorter_at: dict[int, Tensor] = {}
        # A row that is no whole number of blocks has no scales of its own: its blocks count alike.
        self._relative, self._unable = values.new_ones(1, 1), None
        if shape[1] % blocksize == 0:
            self._relative, self._unable = _relative(scales.view(shape[0], -1))

    def level(self, largest: Tensor) -> int:
        """Which of `LEVELS` holds where `largest` is the largest change of each row looked at, in units of its codes' scales."""
        import torch

        usual = largest.kthvalue(math.ceil(MOST_ROWS * len(largest))).values
        return int(torch.bucketize(usual, self._bounds))

    def chosen(self, rows: range, raw: Tensor, change: Tensor, level: int) -> Tensor:
        """Which codes of these rows take part in a change: int8, 1 or 0, flat.

        `raw`, uint8, are the bytes of the codes, which are NF4's: numbered in the order of size. Of `change`, fp32, the signs
        count.
        """
        import torch

        shorter = self._shorter(level)
        if len(shorter) > 1:
            shorter = shorter[rows.start : rows.stop]
        index, count = raw.int(), change.numel()
        rank, turn = (of.index_select(0, index).view(torch.int8)[:count] for of in (self._up, self._turn))
        # The sign is in the last of 32 bits, and a shift to the right by 31 leaves -1 of it.
        rank ^= turn.bitwise_and_(change.view(-1).view(torch.int32).bitwise_right_shift(31).to(torch.int8))
        below = rank.view(*shorter.shape, -1) - shorter[:, :, None]
        return below.bitwise_right_shift_(7).neg_().view(-1)

    def gain(self, rows: range, counts: Tensor) -> Tensor:
        """How many times its own change each code carries, fp32, (columns,), where `counts` of a column's codes take part."""
        able: Tensor | int = len(rows)
        if self._unable is not None:
            able = len(rows) - self._unable[rows.start : rows.stop].sum(0).repeat_interleave(self._blocksize)
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
