"""The levels of codes: looking them up, and moving codes from one level to another by stochastic rounding."""

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
"""Number of equal cells from the lowest level to the highest, which are used to find the level below a number."""

MOST_BOUNDARIES: Final = 2
"""The most levels in one equal cell. If a cell has more, cells are formed by the upper bits of a number instead."""

EDGE: Final = 1e-3
"""The distance from the edge of a cell, in cells, within which rounding may assign a number to the next cell."""

UNEVEN: Final = 8
"""The ratio of the longest to the shortest step above which the shortest says too little about most codes."""


@dataclass(frozen=True, slots=True)
class Levels:
    """The values of a storage's codes.

    Attributes:
        values: the value of each code, or NaN.
        barred: codes that are never written although they have a value.
        twins_apart: whether codes of equal value have different places in the order of values, with a step of length 0 between
            them. Otherwise they share a place, and a code stays the same as long as its value does.
    """

    values: tuple[float, ...]
    barred: frozenset[int] = frozenset()
    twins_apart: bool = False

    def places(self) -> list[list[int]]:
        """Return the codes that may be written, by place in the order of values. Of a place, the first code is written."""
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
    """Return the table of levels on a device. It is made once and shared by threads."""
    return LevelTable(levels, packing, device)


class LevelTable:
    """Levels on one device. The place of a code is the index of its level in the order of values.

    Attributes:
        count: the number of places, n.
        sorted: (n,) fp32, the levels in ascending order.
        shortest: the shortest step between two different levels.
        longest: the longest step between two neighbouring levels.
        per_mean_step: the reciprocal of the mean step.
        is_uneven: whether steps differ so much that `shortest` says little about most codes.
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
        """Turn a table with one entry per code into one for each code of each byte: (256, codes per byte), flat."""
        import torch

        if self._packing.per_byte == 1:
            return torch.cat([of_codes, of_codes.new_zeros(256 - len(of_codes))])
        high, low = torch.meshgrid(of_codes, of_codes, indexing="ij")
        return torch.stack([high, low] if self._packing.high_first else [low, high], -1).view(-1)

    def of_codes(self, of_places: Tensor) -> Tensor:
        """Turn a table with one entry per place into one per code."""
        return of_places.index_select(0, self._place_of)

    def look_up(self, table: Tensor, raw: Tensor, count: int) -> Tensor:
        """Look up the first `count` codes of the bytes `raw` in a table of `by_byte`.

        With two codes per byte, both entries are looked up as one number.
        """
        import torch

        index = raw.int()
        if self._packing.per_byte == 1:
            return table.index_select(0, index)[:count]
        pairs = table.view({1: torch.int16, 4: torch.int64}[table.itemsize])
        return pairs.index_select(0, index).view(table.dtype)[:count]

    def values(self, raw: Tensor, count: int) -> Tensor:
        """Return the values, fp32, of the first `count` codes in the bytes `raw`."""
        return self.look_up(self._value_table, raw, count)

    def places(self, raw: Tensor, count: int) -> Tensor:
        """Return the places, uint8, of the first `count` codes in the bytes `raw`."""
        return self.look_up(self._place_table, raw, count)

    def per_least_step(self, raw: Tensor, count: int) -> Tensor:
        """Return the reciprocal of the shorter step up or down, fp32, of the first `count` codes in the bytes `raw`."""
        return self.look_up(self._per_least_step, raw, count)

    def places_at(self, raw: Tensor, at: Tensor) -> Tensor:
        """Return the places, int32, of the codes at the positions `at` in the bytes `raw`."""
        if self._packing.per_byte == 1:
            return self._place_of.index_select(0, raw.index_select(0, at).int())
        two, shift = raw.index_select(0, at >> 1).int(), self._shift(at)
        return self._place_of.index_select(0, two.bitwise_right_shift_(shift).bitwise_and_(0x0F))

    def bytes(self, places: Tensor) -> Tensor:
        """Return the codes of `places` in bytes, uint8."""
        import torch

        codes = self._code_of.index_select(0, places.int())
        if self._packing.per_byte == 1:
            return codes
        if len(codes) % 2:
            codes = torch.cat([codes, codes[:1]])
        first, second = codes.view(-1, 2).unbind(1)
        return first * 16 + second if self._packing.high_first else second * 16 + first

    def squares(self, raw: Tensor, size: int) -> Tensor:
        """Return the sum of squares of the values of every `size` codes, fp32. `size` codes fill whole bytes."""
        of_bytes = self._square_table.index_select(0, raw.int()).view(-1, size // self._packing.per_byte)
        return of_bytes @ of_bytes.new_ones(of_bytes.shape[1])

    def has_no_number(self, raw: Tensor) -> bool:
        """Return whether a code in the bytes `raw` is NaN."""
        return self._not_numbers is not None and bool(self.look_up(self._not_numbers, raw, 2 * len(raw)).any())

    def put(self, raw: Tensor, at: Tensor, places: Tensor) -> None:
        """Write the codes of `places`, int32, into the bytes `raw` at the positions `at`."""
        codes = self._code_of.index_select(0, places)
        if self._packing.per_byte == 1:
            raw.index_copy_(0, at, codes)
            return
        odd = at.bitwise_and(1)
        for half in (0, 1):  # separately, since both codes of a byte may change
            some = true_places(odd == half)
            in_upper_half = (half == 0) == self._packing.high_first
            shift, kept = (4, 0x0F) if in_upper_half else (0, 0xF0)
            byte = at.index_select(0, some).bitwise_right_shift_(1)
            code = codes.index_select(0, some).bitwise_left_shift_(shift)
            raw.index_copy_(0, byte, raw.index_select(0, byte).bitwise_and_(kept).bitwise_or_(code))

    def moved(self, places: Tensor, shift: Tensor, noise: Tensor) -> Tensor:
        """Add `shift` to the levels at `places`, int32, round stochastically, and return the new places, int32.

        The nearer of the two surrounding levels has the greater odds; `noise`, from 0 to 1, decides. Sums beyond the outermost
        levels go to these. All tensors are flat.
        """
        wanted = self.sorted.index_select(0, places).add_(shift)
        below = self._below(wanted)
        odds = wanted.sub_(self.sorted.index_select(0, below)).mul_(self._per_step.index_select(0, below))
        return below.add_(odds > noise)

    def moved_where_shifted(self, places: Tensor, shift: Tensor, noise: Tensor) -> Tensor:
        """Return the same as `moved`, except that places with a `shift` of 0 stay the same without being computed."""
        some = true_places(shift != 0)
        there = self.moved(*(each.index_select(0, some) for each in (places, shift, noise)))
        return places.index_copy(0, some, there)

    def cut(self, places: Tensor, shift: Tensor, noise: Tensor, there: Tensor) -> int:
        """Return how many places that `moved` took to an outermost level would have gone further if there were a next level."""
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
        """Return the bit offset, int32, of the codes at the positions `at` in their bytes."""
        odd = at.bitwise_and(1).int()
        return (1 - odd) * 4 if self._packing.high_first else odd * 4

    def _least_steps(self, steps: Tensor) -> Tensor:
        """Return the shorter of the steps up and down from each place, ignoring steps of length 0."""
        import torch

        lengths = torch.where(steps > 0, steps, math.inf)
        end = lengths.new_full((1,), math.inf)
        return torch.cat([end, lengths]).minimum(torch.cat([lengths, end]))


def _below_in_cells(levels: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that finds for each number the place, int32, of the highest level that is not above it.

    Of equal levels it returns the last one, and never the highest place of all. Numbers are sorted into equal cells.
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
    """Return the same as `_below_in_cells`, for very uneven steps: the cell of a number is the upper half of its fp32 bits."""
    import torch

    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device=levels.device) << 16
    one_end, other_end = patterns.view(torch.float32), (patterns | 0xFFFF).view(torch.float32)
    other_end = torch.where(other_end.isnan(), one_end, other_end)  # the cell of infinity
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
    """Return the place below the least number of each cell, int32, and the most levels in a cell."""
    import torch

    places = torch.searchsorted(levels, least, right=True)
    held = torch.searchsorted(levels, most, right=True) - places
    return (places - 1).clamp_(0, len(levels) - 2).to(torch.int32), max(1, int(held.max()))


def _following(levels: Tensor) -> Tensor:
    """Return the level above each place but the last. That of the last but one is NaN, so that no number reaches it."""
    import torch

    return torch.cat([levels[1:-1], levels.new_full((1,), math.nan)])


def true_places(mask: Tensor) -> Tensor:
    """Return the positions, int64, where a flat `mask` is true. On a CPU, NumPy is several times faster than torch."""
    import numpy as np
    import torch

    return torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.device.type == "cpu" else mask.nonzero().squeeze(1)


def where_at_least(numbers: Tensor, least: float, among: Tensor | None) -> Tensor:
    """Return the positions, int64, where flat `numbers` are at least `least` and `among`, int8, is 1.

    On a CPU, NumPy compares several times faster than torch.
    """
    import torch

    found = torch.from_numpy(numbers.numpy() >= least) if numbers.device.type == "cpu" else numbers >= least
    return true_places(found if among is None else found.bitwise_and_(among.view(torch.bool)))
