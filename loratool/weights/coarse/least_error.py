"""Rounding of codes with error compensation between inputs (`loratool.weights.coarse.feedback`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratool.weights.coarse.block import Block, Found, Numbers
from loratool.weights.coarse.feedback import Feedback
from loratool.weights.coarse.levels import LevelTable, true_places
from loratool.weights.coarse.manner import Manner
from loratool.weights.rounding import noise_of

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor


class LeastError:
    """Rounds blocks of a parameter whose inputs are known."""

    def __init__(self, table: LevelTable, numbers: Numbers) -> None:
        self._table, self._numbers = table, numbers

    def found(self, block: Block, manner: Manner, feedback: Feedback) -> tuple[Found, bool]:
        """Return the codes that change, and whether the carriers of the manner carry the change instead of all codes."""
        import torch

        shape, scaling, carriers = block.area.shape, block.scaling, manner.carriers
        before = torch.cat([self._numbers.of(block, few).float() for few in block.strips()]).view(shape)
        here = self._table.places(block.raw, block.area.count).view(shape).int()
        carried = block.change
        if carriers is not None:
            carried = block.change * carriers.gain * carriers.chosen.view(shape)

        def ordered(each: Tensor) -> Tensor:
            return each.index_select(1, feedback.order)

        def spread(each: Tensor) -> Tensor:
            return ordered(scaling.spread(each, block.area).view(shape))

        places, noise = ordered(here), ordered(noise_of(manner.words).view(shape))
        scales, per_scale = spread(self._numbers.per_level(scaling.scales)), spread(scaling.per_scale)
        base = None if scaling.base is None else spread(scaling.base)

        def move(part: slice, added: Tensor) -> tuple[Tensor, Tensor]:
            """Return the places of the codes of these columns after a change is added, and their numbers."""
            steps = added * per_scale[:, part]
            there = self._table.moved_where_shifted(
                *(each.reshape(-1) for each in (places[:, part], steps, noise[:, part]))
            )
            numbers = self._table.sorted.index_select(0, there).view(steps.shape) * scales[:, part]
            return there.view(steps.shape), numbers if base is None else numbers + base[:, part]

        in_order, short = feedback.best(ordered(before), ordered(block.change), ordered(carried), move)
        moved = torch.empty_like(here).index_copy_(1, feedback.order, in_order)
        at = true_places((moved != here).view(-1))
        there = moved.view(-1).index_select(0, at)
        jumps = self._numbers.at(there, scaling.picked(block.area, at)).sub_(before.view(-1).index_select(0, at))
        return Found(at, there, jumps), short
