"""The levels that codes stand for: looked up, and moved from one to another by chance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final

from loratool.weights.coarse.packing import Packing

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor

CELLS: Final = 1024
"""Equal cells from the lowest level to the highest, by which the level below a number is found."""

MOST_BOUNDARIES: Final = 2
"""Where one of the equal cells holds more levels than this, cells are made by the upper bits of a number."""

EDGE: Final = 1e-3
"""A number this much of a cell beside its edge may be taken for one of the cell beside, by the rounding of its place."""

UNEVEN: Final = 8
"""Where the longest step is more than so many times the shortest, the shortest tells nothing of most codes."""


@dataclass(frozen=True, slots=True)
class Levels:
    """What each code of a storage stands for.

    Attributes:
        values: of each code; NaN for one that is no number.
        barred: codes that are never written, though they stand for a number.
        twins_apart: whether codes of equal values have places of their own in the order of values, a step of no length apart; if
            not they share one, and a code stays as it is while its value does.
    """

    values: tuple[float, ...]
    barred: frozenset[int] = frozenset()
    twins_apart: bool = False

    def places(self) -> list[list[int]]:
        """The codes that may be written, in the order of their values; of those that share a place the one to write first."""
        usable = [code for code, value in enumerate(self.values) if code not in self.barred and not math.isnan(value)]
        places: list[list[int]] = []
        for code in sorted(usable, key=lambda code: self.values[code]):
            if places and not self.twins_apart and self.values[places[-1][0]] == self.values[code]:
                places[-1].append(code)
            else:
                places.append([code])
        return places


@cache
def level_table(levels: Levels, packing: Packing, device: torch.device) -> LevelTable:
    """The table of levels on a device; made once, and shared by threads."""
    return LevelTable(levels, packing, device)


class LevelTable:
    """Levels on one device. The place of a code is that of its level in the order of values.

    Attributes:
        count: the number of places, n.
        sorted: (n,) fp32, the levels in the order of their values.
        shortest: the least step between two levels that differ, and `longest` the largest one.
        per_mean_step: the number of steps from the lowest to the highest level, by their distance.
    """

    def __init__(self, levels: Levels, packing: Packing, device: torch.device) -> None:
        import torch

        places = levels.places()
        self._packing = packing
        values = torch.tensor(levels.values, device=device)
        self._code_of = torch.tensor([codes[0] for codes in places], dtype=torch.uint8, device=device)
        self.sorted = values.index_select(0, self._code_of.int())
        place_of = torch.searchsorted(self.sorted, values.nan_to_num(0)).clamp_(max=len(places) - 1).tolist()
        for place, codes in enumerate(places):
            for code in codes:
                place_of[code] = place
        self._place_of = torch.tensor(place_of, dtype=torch.int32, device=device)
        self._not_numbers = self.by_byte(values.isnan()) if values.isnan().any() else None
        self._value_table = self.by_byte(values)
        self._place_table = self.by_byte(self._place_of.to(torch.uint8))
        self._square_table = self._value_table.square().view(256, packing.per_byte).sum(1)
        steps = self.sorted[1:] - self.sorted[:-1]
        self._per_step = 1 / steps
        self.count = len(places)
        self.shortest, self.longest = float(steps[steps > 0].min()), float(steps.max())
        self.per_mean_step = len(steps) / float(self.sorted[-1] - self.sorted[0])
        self.is_uneven = self.longest > UNEVEN * self.shortest
        self._per_least_step = self.by_byte(1 / self._least_steps(steps).index_select(0, self._place_of))
        self._below = _below_in_bits(self.sorted) if self.is_uneven else _below_in_cells(self.sorted)

    def by_byte(self, of_codes: Tensor) -> Tensor:
        """Facts of codes as a table of the codes of each byte: (256, codes a byte), flat."""
        import torch

        if self._packing.per_byte == 1:
            return torch.cat([of_codes, of_codes.new_zeros(256 - len(of_codes))])
        high, low = torch.meshgrid(of_codes, of_codes, indexing="ij")
        return torch.stack([high, low] if self._packing.high_first else [low, high], -1).view(-1)

    def of_codes(self, of_places: Tensor) -> Tensor:
        """Facts of places as those of the codes there."""
        return of_places.index_select(0, self._place_of)

    def look_up(self, table: Tensor, raw: Tensor, count: int) -> Tensor:
        """What a table of `by_byte` has for the first `count` codes in the bytes `raw`. Two facts are looked up as one number."""
        import torch

        index = raw.int()
        if self._packing.per_byte == 1:
            return table.index_select(0, index)[:count]
        pairs = table.view({1: torch.int16, 4: torch.int64}[table.itemsize])
        return pairs.index_select(0, index).view(table.dtype)[:count]

    def values(self, raw: Tensor, count: int) -> Tensor:
        """The values, fp32, of the first `count` codes in the bytes `raw`."""
        return self.look_up(self._value_table, raw, count)

    def places(self, raw: Tensor, count: int) -> Tensor:
        """The places, uint8, of the first `count` codes in the bytes `raw`."""
        return self.look_up(self._place_table, raw, count)

    def per_least_step(self, raw: Tensor, count: int) -> Tensor:
        """One by the shorter of the steps up and down, fp32, of the first `count` codes in the bytes `raw`."""
        return self.look_up(self._per_least_step, raw, count)

    def places_at(self, raw: Tensor, at: Tensor) -> Tensor:
        """The places, int32, of the codes numbered `at` in the bytes `raw`."""
        if self._packing.per_byte == 1:
            return self._place_of.index_select(0, raw.index_select(0, at).int())
        two, shift = raw.index_select(0, at >> 1).int(), self._shift(at)
        return self._place_of.index_select(0, two.bitwise_right_shift_(shift).bitwise_and_(0x0F))

    def bytes(self, places: Tensor) -> Tensor:
        """The codes at `places`, uint8, in bytes."""
        import torch

        codes = self._code_of.index_select(0, places.int())
        if self._packing.per_byte == 1:
            return codes
        if len(codes) % 2:
            codes = torch.cat([codes, codes[:1]])
        first, second = codes.view(-1, 2).unbind(1)
        return first * 16 + second if self._packing.high_first else second * 16 + first

    def squares(self, raw: Tensor, size: int) -> Tensor:
        """The sum of the squares of the values of every `size` codes, which divides theirs: fp32; whole bytes each."""
        of_bytes = self._square_table.index_select(0, raw.int()).view(-1, size // self._packing.per_byte)
        return of_bytes @ of_bytes.new_ones(of_bytes.shape[1])

    def has_no_number(self, raw: Tensor) -> bool:
        """Whether one of the codes in the bytes `raw` stands for no number."""
        return self._not_numbers is not None and bool(self.look_up(self._not_numbers, raw, 2 * len(raw)).any())

    def put(self, raw: Tensor, at: Tensor, places: Tensor) -> None:
        """Put the codes of `places`, int32, into the bytes `raw`, in place of the codes numbered `at`."""
        codes = self._code_of.index_select(0, places)
        if self._packing.per_byte == 1:
            raw.index_copy_(0, at, codes)
            return
        odd = at.bitwise_and(1)
        for half in (0, 1):  # one after the other: a byte may hold two of them
            some = true_places(odd == half)
            in_upper_half = (half == 0) == self._packing.high_first
            shift, kept = (4, 0x0F) if in_upper_half else (0, 0xF0)
            byte = at.index_select(0, some).bitwise_right_shift_(1)
            code = codes.index_select(0, some).bitwise_left_shift_(shift)
            raw.index_copy_(0, byte, raw.index_select(0, byte).bitwise_and_(kept).bitwise_or_(code))

    def moved(self, places: Tensor, shift: Tensor, noise: Tensor) -> Tensor:
        """The places, int32, that levels at `places`, int32, come to when `shift` is added.

        That of the level above with the odds of its nearness, else that of the one below; `noise`, from 0 to 1, decides. All are
        flat. What is beyond the outermost levels comes to these.
        """
        wanted = self.sorted.index_select(0, places).add_(shift)
        below = self._below(wanted)
        odds = wanted.sub_(self.sorted.index_select(0, below)).mul_(self._per_step.index_select(0, below))
        return below.add_(odds > noise)

    def moved_where_shifted(self, places: Tensor, shift: Tensor, noise: Tensor) -> Tensor:
        """As `moved`, without work for those whose `shift` is 0: they stay."""
        some = true_places(shift != 0)
        there = self.moved(*(each.index_select(0, some) for each in (places, shift, noise)))
        return places.index_copy(0, some, there)

    def cut(self, places: Tensor, shift: Tensor, noise: Tensor, there: Tensor) -> int:
        """How many of the levels that `moved` led to an outermost one chance would have led farther, were there another step."""
        last = len(self.sorted) - 1
        ends = true_places((there == 0) | (there == last))
        if not len(ends):
            return 0
        wanted = self.sorted.index_select(0, places.index_select(0, ends)).add_(shift.index_select(0, ends))
        of_chance = noise.index_select(0, ends)
        above = (wanted - self.sorted[-1]) * self._per_step[-1] > of_chance
        below = (self.sorted[0] - wanted) * self._per_step[0] > 1 - of_chance
        return int((above | below).count_nonzero())

    def _shift(self, at: Tensor) -> Tensor:
        """How far to the right the codes numbered `at` are to be moved in their bytes, int32."""
        odd = at.bitwise_and(1).int()
        return (1 - odd) * 4 if self._packing.high_first else odd * 4

    def _least_steps(self, steps: Tensor) -> Tensor:
        """The shorter of the steps up and down from each place, of those that have a length."""
        import torch

        lengths = torch.where(steps > 0, steps, math.inf)
        end = lengths.new_full((1,), math.inf)
        return torch.cat([end, lengths]).minimum(torch.cat([lengths, end]))


def _below_in_cells(levels: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that gives the place of the highest level which is not above each number; int32, the last but one at most.

    Of levels that are equal it is the last. Numbers are sorted into equal cells.
    """
    import torch

    low, width = float(levels[0]), (float(levels[-1]) - float(levels[0])) / CELLS
    edges = torch.linspace(low, float(levels[-1]), CELLS + 1, device=levels.device)
    places, boundaries = _starts(levels, edges[:-1], edges[1:] + EDGE * width)
    if boundaries > MOST_BOUNDARIES:
        return _below_in_bits(levels)
    following = _following(levels)

    def below(wanted: Tensor) -> Tensor:
        cell = (wanted - low).mul_(1 / width).clamp_(0, CELLS - 1).int()
        found = places.index_select(0, cell)
        for _ in range(boundaries):
            found += wanted >= following.index_select(0, found)
        return found

    return below


def _below_in_bits(levels: Tensor) -> Callable[[Tensor], Tensor]:
    """As `_below_in_cells`, for levels of very different steps: a number's cell is the upper half of its bits (binary32)."""
    import torch

    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device=levels.device) << 16
    one_end, other_end = patterns.view(torch.float32), (patterns | 0xFFFF).view(torch.float32)
    other_end = torch.where(other_end.isnan(), one_end, other_end)  # of infinity
    least, most = (
        end.nan_to_num(0, math.inf, -math.inf) for end in (one_end.minimum(other_end), one_end.maximum(other_end))
    )
    places, boundaries = _starts(levels, least, most)
    following = _following(levels)

    def below(wanted: Tensor) -> Tensor:
        cell = (wanted.view(torch.int32) >> 16).add_(1 << 15)
        found = places.index_select(0, cell)
        for _ in range(boundaries):
            found += wanted >= following.index_select(0, found)
        return found

    return below


def _starts(levels: Tensor, least: Tensor, most: Tensor) -> tuple[Tensor, int]:
    """The place below the least number of each cell, int32, and how many levels a cell holds at most."""
    import torch

    places = torch.searchsorted(levels, least, right=True)
    held = torch.searchsorted(levels, most, right=True) - places
    return (places - 1).clamp_(0, len(levels) - 2).to(torch.int32), max(1, int(held.max()))


def _following(levels: Tensor) -> Tensor:
    """The level above each place. Above the last but one there is none to go to: no number is at or above NaN."""
    import torch

    return torch.cat([levels[1:-1], levels.new_full((1,), math.nan)])


def true_places(mask: Tensor) -> Tensor:
    """Where a flat `mask` is true: int64. On a CPU numpy finds it several times as quickly as torch."""
    import numpy as np
    import torch

    return torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.device.type == "cpu" else mask.nonzero().squeeze(1)


def where_at_least(numbers: Tensor, least: float, among: Tensor | None) -> Tensor:
    """Where flat `numbers` are no less, of those that `among`, int8, is 1 for: int64.

    On a CPU numpy compares them several times as quickly as torch.
    """
    import torch

    found = torch.from_numpy(numbers.numpy() >= least) if numbers.device.type == "cpu" else numbers >= least
    return true_places(found if among is None else found.bitwise_and_(among.view(torch.bool)))
