"""The sixteen values of a kind of 4-bit codes: looked up, and moved from one to another by chance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from loratool.weights.four_bit import VALUES

if TYPE_CHECKING:
    import torch

CELLS: Final = 1024
"""Equal cells from -1 to 1 so small that none holds more than one value of NF4 or two of FP4 next to zero."""


class CodeTable:
    """The codes of ``nf4`` or ``fp4`` on one device. The place of a code is that of its value in the order of size.

    Attributes:
        sorted: (16,) fp32, the values in the order of size.
        shortest: the least step between two values that differ.
    """

    def __init__(self, kind: str, device: torch.device) -> None:
        import torch

        values = torch.tensor(VALUES[kind], device=device)
        # A byte holds two codes: two fp32 numbers, looked up as one integer of 64 bits, and two places as one of 16.
        high, low = torch.meshgrid(values, values, indexing="ij")
        self._pairs = torch.stack([high, low], -1).view(torch.int64).view(256)
        self.sorted, order = values.sort(stable=True)
        places = order.argsort().to(torch.uint8)
        high, low = torch.meshgrid(places, places, indexing="ij")
        self._pair_places = torch.stack([high, low], -1).view(torch.int16).view(256)
        self._code_of, self._place_of = order.to(torch.uint8), places.int()
        self._squares = self._pairs.view(torch.float32).view(256, 2).square().sum(1)
        steps = self.sorted[1:] - self.sorted[:-1]
        self._per_step = 1 / steps
        self.shortest = float(steps[steps > 0].min())
        # Above the last step there is none to go to: no number, not even infinity, is at or above NaN.
        self._next = torch.cat([self.sorted[1:15], self.sorted.new_full((1,), math.nan)])
        cells = torch.linspace(-1, 1, CELLS + 1, device=device)[:-1]
        self._below = (torch.searchsorted(self.sorted, cells, right=True) - 1).clamp_(0, 14).to(torch.int32)
        self._boundaries_in_a_cell = 2 if kind == "fp4" else 1

    def values(self, raw: torch.Tensor, count: int) -> torch.Tensor:
        """The values, fp32, of the first `count` codes in the bytes `raw`."""
        import torch

        return self._pairs.index_select(0, raw.int()).view(torch.float32)[:count]

    def places(self, raw: torch.Tensor, count: int) -> torch.Tensor:
        """The places, uint8, of the first `count` codes in the bytes `raw`."""
        import torch

        return self._pair_places.index_select(0, raw.int()).view(torch.uint8)[:count]

    def places_at(self, raw: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """The places, int32, of the codes numbered `at` in the bytes `raw`."""
        two, odd = raw.index_select(0, at >> 1).int(), at.bitwise_and(1).int()
        return self._place_of.index_select(0, two.bitwise_right_shift_((1 - odd) * 4).bitwise_and_(0x0F))

    def bytes(self, places: torch.Tensor) -> torch.Tensor:
        """The codes at `places`, uint8, in bytes."""
        import torch

        if len(places) % 2:
            places = torch.cat([places, places[:1]])
        high, low = self._code_of.index_select(0, places.int()).view(-1, 2).unbind(1)
        return high * 16 + low

    def squares(self, raw: torch.Tensor, size: int) -> torch.Tensor:
        """The sum of the squares of the values of every `size` codes, an even number that divides theirs: fp32."""
        of_bytes = self._squares.index_select(0, raw.int()).view(-1, size // 2)
        return of_bytes @ of_bytes.new_ones(size // 2)

    def put(self, raw: torch.Tensor, at: torch.Tensor, places: torch.Tensor) -> None:
        """Put the codes of `places`, int32, into the bytes `raw`, in place of the codes numbered `at`."""
        codes, odd = self._code_of.index_select(0, places), at.bitwise_and(1)
        for half, shift, kept in ((0, 4, 0x0F), (1, 0, 0xF0)):  # one after the other: a byte may hold two of them
            some = true_places(odd == half)
            byte = at.index_select(0, some).bitwise_right_shift_(1)
            code = codes.index_select(0, some).bitwise_left_shift_(shift)
            raw.index_copy_(0, byte, raw.index_select(0, byte).bitwise_and_(kept).bitwise_or_(code))

    def moved(self, places: torch.Tensor, shift: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The places, int32, that values at `places`, int32, come to when `shift` is added.

        That of the value above with the odds of its nearness, else that of the one below; `noise`, from 0 to 1, decides. All
        are flat.
        """
        wanted = self.sorted.index_select(0, places).add_(shift)
        below = self._at_or_below(wanted)
        odds = wanted.sub_(self.sorted.index_select(0, below)).mul_(self._per_step.index_select(0, below))
        return below.add_(odds > noise)

    def moved_where_shifted(self, places: torch.Tensor, shift: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """As `moved`, without work for those whose `shift` is 0: they stay."""
        some = true_places(shift != 0)
        there = self.moved(*(each.index_select(0, some) for each in (places, shift, noise)))
        return places.index_copy(0, some, there)

    def _at_or_below(self, wanted: torch.Tensor) -> torch.Tensor:
        """The place of the largest value that is not above each number, 14 at most; of FP4's two zeros the second."""
        cell = (wanted + 1).mul_(CELLS // 2).clamp_(0, CELLS - 1).int()
        below = self._below.index_select(0, cell)
        for _ in range(self._boundaries_in_a_cell):
            below += wanted >= self._next.index_select(0, below)
        return below


def true_places(mask: torch.Tensor) -> torch.Tensor:
    """Where a flat `mask` is true: int64. On a CPU numpy tells it several times as quickly as torch."""
    import numpy as np
    import torch

    return torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.device.type == "cpu" else mask.nonzero().squeeze(1)


def where_at_least(numbers: torch.Tensor, least: float, among: torch.Tensor | None) -> torch.Tensor:
    """Where flat `numbers` are no less, of those that `among`, int8, is 1 for: int64.

    On a CPU numpy compares them several times as quickly as torch.
    """
    import torch

    found = torch.from_numpy(numbers.numpy() >= least) if numbers.device.type == "cpu" else numbers >= least
    return true_places(found if among is None else found.bitwise_and_(among.view(torch.bool)))
