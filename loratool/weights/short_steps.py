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


class ShortSteps:
    """The steps of a matrix, (rows, columns): `scales` of its blocks, fp32, and the sorted `values` of its codes."""

    def __init__(self, scales: Tensor, shape: tuple[int, int], blocksize: int, values: Tensor) -> None:
        import torch

        self._columns = shape[1]
        self._blocksize = blocksize
        # A row that is no whole number of blocks has no scales of its own: its blocks count alike.
        self._scales = scales.view(shape[0], -1) if shape[1] % blocksize == 0 else None
        steps, end = values[1:] - values[:-1], values.new_full((1,), math.inf)
        self._steps = torch.cat([end, steps, steps, end])  # down, then up
        bounds, short = zip(*LEVELS, strict=True)
        self._bounds, self._short = values.new_tensor(bounds[:-1]), values.new_tensor(short)

    def chosen(self, rows: range, places: Tensor, shift: Tensor) -> Tensor:
        """Which codes, at `places`, take part in a `shift` in units of their scales: bool, flat as these are."""
        import torch

        largest = shift.view(len(rows), self._columns).abs().amax(1)
        usual = largest.kthvalue(math.ceil(MOST_ROWS * len(rows))).values
        short = self._short[torch.bucketize(usual, self._bounds)]
        steps = self._steps.index_select(0, places + (shift > 0).to(torch.int32).mul_(16))
        if self._scales is None:
            return steps <= short
        scales = self._scales[rows.start : rows.stop]
        limit = short * scales.median(1, keepdim=True).values / scales
        return (steps.view(*scales.shape, self._blocksize) <= limit[:, :, None]).view(-1)

    def counts(self, rows: range, chosen: Tensor) -> Tensor:
        """How many codes of each column take part, in these rows: int32."""
        import torch

        return chosen.view(len(rows), self._columns).sum(0, dtype=torch.int32)

    def concentrated(self, rows: range, shift: Tensor, chosen: Tensor, counts: Tensor) -> Tensor:
        """The `shift` of the codes that take part, so much larger that they carry that of their column; else 0."""
        import torch

        gain = len(rows) / counts.clamp(min=1).float()
        grown = (shift.view(len(rows), -1) * gain).view(-1)
        return torch.where(chosen, grown, 0.0)
