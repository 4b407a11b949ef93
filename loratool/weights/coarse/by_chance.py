"""Stochastic rounding of codes to one of the two levels around the exact result, with error compensation between outputs."""

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
    """The codes of a block that may change. All others certainly stay the same.

    Attributes:
        at: (n,) int64, ascending, their positions in the flattened block.
        places: (n,) int32, the places of their levels in the order of values.
        scaling: the scales of their tiles.
        wanted: (n,) fp32, the wanted change of each, in units of levels.
        noise: (n,) fp32, a random number from 0 to 1 for each.
    """

    at: Tensor
    places: Tensor
    scaling: Picked
    wanted: Tensor
    noise: Tensor

    def __getitem__(self, few: slice) -> Movable:
        return Movable(self.at[few], self.places[few], self.scaling[few], self.wanted[few], self.noise[few])


class ByChance:
    """Rounds blocks of a parameter, each code by its own random number."""

    def __init__(self, table: LevelTable, numbers: Numbers) -> None:
        self._table, self._numbers = table, numbers

    def found(self, block: Block, manner: Manner) -> Found:
        """Return the codes that change, each rounded independently."""
        codes = self._movable(block, manner, 1)
        return _changed(codes.at, *self._moved(codes, codes.wanted))

    def found_with_feedback(self, block: Block, manner: Manner, outputs: OutputFeedback, *, by_block: bool) -> Found:
        """Return the codes that change when later outputs compensate the errors of earlier ones."""
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
        """Add to codes, in units of levels; return their new places, the changes of their numbers, and how many are cut."""
        there = self._table.moved(codes.places, added, codes.noise)
        jumps = self._numbers.at(there, codes.scaling).sub_(self._numbers.at(codes.places, codes.scaling))
        return there, jumps, self._table.cut(codes.places, added, codes.noise, there)

    def _movable(self, block: Block, manner: Manner, most: float) -> Movable:
        """Return the codes that may change when up to `most` times their wanted change is added.

        A code goes up if its odds, change / step, exceed its noise, and down if they exceed ``1 - noise``. The shortest step of
        the table bounds the odds, which excludes most codes without looking up their own steps. If steps are very uneven, the
        shorter of a code's own two steps is looked up instead.
        """
        import torch

        table, carriers = self._table, manner.carriers
        times = most * WORDS / (1 if table.is_uneven else table.shortest)
        gains = times if carriers is None else carriers.gain * times
        found = []
        for few in block.strips():
            # In units of 1 / WORDS, noise is words + 1/2 + WORDS / 2. Both conditions are one on the distance to the middle, and
            # no code without a change meets it.
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
    """Keep only the codes whose numbers change; a move between two codes of the same number is dropped."""
    changed = true_places(jumps != 0)
    at, there, jumps = (each.index_select(0, changed) for each in (at, there, jumps))
    return Found(at, there, jumps, cut)


def _of_rows(passes: bool | Tensor, rows: slice) -> Tensor | None:
    """Return the mask of these rows, or of all columns, that take part, or None if all do."""
    if isinstance(passes, bool):
        return None
    return passes[rows] if len(passes) > 1 else passes


def off_by(change: Tensor, at: Tensor, jumps: Tensor) -> Tensor:
    """Return the errors, as a new tensor, if numbers were to change by `change` and those at `at` changed by `jumps`."""
    error = change.neg()
    error.view(-1).index_add_(0, at, jumps)
    return error
