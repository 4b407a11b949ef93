"""Codes that go to one of the two levels around what they are to become, by chance; errors are passed on between outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.weights.coarse.block import Block, Found, Numbers
from loratool.weights.coarse.levels import LevelTable, true_places, where_at_least
from loratool.weights.coarse.manner import Manner
from loratool.weights.coarse.output_feedback import MOST_PASSED, OutputFeedback
from loratool.weights.coarse.tiles import Picked
from loratool.weights.rounding import WORDS, noise_of

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Movable:
    """Codes of a block that chance may move; of all others it is known before that they stay.

    Attributes:
        at: (n,) int64, ascending, where they are in the flattened block.
        places: (n,) int32, where their levels are in the order of values.
        scaling: that of their tiles.
        wanted: (n,) fp32, what is to be added to each, in units of levels.
        noise: (n,) fp32, chance, from 0 to 1.
    """

    at: Tensor
    places: Tensor
    scaling: Picked
    wanted: Tensor
    noise: Tensor

    def __getitem__(self, few: slice) -> Movable:
        return Movable(self.at[few], self.places[few], self.scaling[few], self.wanted[few], self.noise[few])


class ByChance:
    """Rounds blocks of a parameter, each code by its own chance."""

    def __init__(self, table: LevelTable, numbers: Numbers) -> None:
        self._table, self._numbers = table, numbers

    def found(self, block: Block, manner: Manner) -> Found:
        """Where codes go, without regard to one another."""
        codes = self._movable(block, manner, 1)
        return _changed(codes.at, *self._moved(codes, codes.wanted))

    def found_with_feedback(self, block: Block, manner: Manner, outputs: OutputFeedback, *, by_block: bool) -> Found:
        """Where codes go, where what earlier outputs are off by is made good by later ones."""
        import torch

        codes = self._movable(block, manner, 1 + MOST_PASSED)
        columns, last, there, jumps, cut = block.area.shape[1], 0, [], [], 0
        for group, passed in outputs.groups(block.area.rows, columns, by_block=by_block):
            part = slice(group.start - block.area.rows.start, group.stop - block.area.rows.start)
            passes = _of_rows(manner.passes, part)
            first, last = last, int(torch.searchsorted(codes.at, part.stop * columns))
            few = codes[first:last]
            at, most = few.at - part.start * columns, few.wanted.abs().mul_(MOST_PASSED)
            passed = passed if passes is None else passed * passes
            shifts = passed.view(-1).index_select(0, at).div_(self._numbers.per_level(few.scaling.scales))
            found = self._moved(few, shifts.maximum(-most).minimum(most).add_(few.wanted))
            there.append(found[0])
            jumps.append(found[1])
            cut += found[2]
            error = off_by(block.change[part], at, found[1])
            outputs.add(group, error if passes is None else error.mul_(passes))
        return _changed(codes.at, torch.cat(there), torch.cat(jumps), cut)

    def _moved(self, codes: Movable, added: Tensor) -> tuple[Tensor, Tensor, int]:
        """Where codes come to when something is added, in units of levels: places, changes of numbers, and how many are cut."""
        there = self._table.moved(codes.places, added, codes.noise)
        jumps = self._numbers.at(there, codes.scaling).sub_(self._numbers.at(codes.places, codes.scaling))
        return there, jumps, self._table.cut(codes.places, added, codes.noise, there)

    def _movable(self, block: Block, manner: Manner, most: float) -> Movable:
        """The codes that chance may move when up to `most` times what they are to change by is added.

        A code goes up where the odds, change / step, are above its noise, and down where they are above ``1 - noise``. No step
        is shorter than the shortest, so that of most codes it is known without a look at theirs. Where steps are very unlike, the
        shorter one of each code's own is looked up.
        """
        import torch

        table, carriers = self._table, manner.carriers
        times = most * WORDS / (1 if table.is_uneven else table.shortest)
        gains = times if carriers is None else carriers.gain * times
        found = []
        for few in block.strips():
            # In units of 1 / WORDS, noise is words + 1/2 + WORDS / 2; the two conditions are one on the distance to the middle,
            # which no code meets that nothing is added to.
            shifts = block.shifts(few).view(few.area.shape).mul_(gains).view(-1)
            odds = shifts
            if table.is_uneven:
                odds = shifts * table.per_least_step(block.bytes(few), few.area.count)
            words = manner.words[few.flat]
            chosen = None if carriers is None else carriers.chosen[few.flat]
            at = where_at_least(odds.sub(words.float()).sub_(0.5).abs_(), WORDS / 2, chosen)
            wanted, noise = shifts.index_select(0, at).div_(times), noise_of(words.index_select(0, at))
            places = table.places_at(block.bytes(few), at)
            at += few.flat.start
            found.append((at, places, wanted, noise))
        at, places, wanted, noise = (torch.cat(column) for column in zip(*found, strict=True))
        return Movable(at, places, block.scaling.picked(block.area, at), wanted, noise)


def _changed(at: Tensor, there: Tensor, jumps: Tensor, cut: int) -> Found:
    """Those codes alone whose numbers change: none goes from one code of a number to another."""
    changed = true_places(jumps != 0)
    at, there, jumps = (each.index_select(0, changed) for each in (at, there, jumps))
    return Found(at, there, jumps, cut)


def _of_rows(passes: bool | Tensor, rows: slice) -> Tensor | None:
    """Which of these rows, or of all columns, take part; None where all do."""
    if isinstance(passes, bool):
        return None
    return passes[rows] if len(passes) > 1 else passes


def off_by(change: Tensor, at: Tensor, jumps: Tensor) -> Tensor:
    """What numbers are off by that were to change by `change`, when those numbered `at` changed by `jumps`: new."""
    error = change.neg()
    error.view(-1).index_add_(0, at, jumps)
    return error
