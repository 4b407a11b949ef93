"""Measurement of how much of an update the stored numbers carry, whatever their storage.

Coarse storages are measured whole. Dense ones are measured on a few rows of a few blocks, chosen by a hash of the parameter's
name, so that it costs little.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    import torch

    from loratool.weights.code_moves import Moves

ENOUGH: Final = 0.9
"""Share of an update below which a merge gets a warning."""

LEAST: Final = 0.5
"""Share of an update below which a merge fails."""

MOST_NOISE: Final = 1e18
"""Value of noise whose square overflows fp32."""

BLOCKS_OF: Final = 16
"""One in so many blocks of a dense parameter is measured, and at least `LEAST_BLOCKS`."""

LEAST_BLOCKS: Final = 2

ROWS: Final = 8
"""Rows of each of these blocks that are measured."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """How much of an update, delta, was delivered to one parameter or to several.

    Attributes:
        share: the projection of the stored change on delta, ``<W' - W, delta> / <delta, delta>``: 1 if the whole update is
            there, 0 if it is lost.
        noise: root mean square of ``W' - W - delta``, in units of that of W.
        changed: the share of elements that changed.
        measured: the share of the elements that were measured.
    """

    share: float
    noise: float
    changed: float
    measured: float = 1.0

    def to_json(self) -> dict[str, float]:
        return {"share": self.share, "noise": self.noise, "changed": self.changed, "measured": self.measured}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Parse what `to_json` returned; raise KeyError, TypeError or ValueError for anything else."""
        numbers = [*(value[key] for key in ("share", "noise", "changed")), value.get("measured", 1.0)]
        if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
            raise ValueError(value)
        return cls(*map(float, numbers))


def measured_rows(name: str, blocks: Sequence[range]) -> dict[range, range]:
    """Return the rows to measure of a dense parameter, by the block that they are in."""
    choice = random.Random(name)  # seeded by a hash of the name
    count = min(max(LEAST_BLOCKS, -(-len(blocks) // BLOCKS_OF)), len(blocks))
    chosen: dict[range, range] = {}
    for block in choice.sample(blocks, count):
        first = choice.randint(0, max(len(block) - ROWS, 0))
        chosen[block] = block[first : first + ROWS]
    return chosen


class DeliveryCount:
    """Sums over the blocks of one or several parameters, from which a `Delivery` is computed.

    `elements` is the number of elements that the update changes, if not all of them are counted.
    """

    def __init__(self, elements: int | None = None) -> None:
        self._carried = self._delta = self._noise = self._weight = self._changed = self._standing_for = 0.0
        self._counted = 0
        self._elements = elements

    def add(self, before: torch.Tensor, wanted: torch.Tensor, after: torch.Tensor) -> None:
        """Count a block: the decoded W, W + delta, and the decoded W'. The last two are overwritten."""
        self._changed += int((after != before).sum())
        self._add_elements(before.numel())
        self._weight += _dot(before, before)
        delta, change = wanted.sub_(before), after.sub_(before)
        self._carried += _dot(change, delta)
        self._delta += _dot(delta, delta)
        change.sub_(delta)
        self._noise += _dot(change, change)

    def add_moves(self, delta: torch.Tensor, moves: Moves) -> None:
        """Count a block with these changed codes. `delta` is the wanted change of W, (rows, columns)."""
        jumps = moves.jumps.double()
        carried, delta_squared = float(jumps @ delta.view(-1).index_select(0, moves.at).double()), _dot(delta, delta)
        self._changed += int(moves.jumps.count_nonzero())
        self._add_elements(delta.numel())
        self._weight += moves.squares
        self._carried += carried
        self._delta += delta_squared
        self._noise += max(float(jumps @ jumps) - 2 * carried + delta_squared, 0.0)

    def _add_elements(self, count: int) -> None:
        self._standing_for += count
        self._counted += count

    @classmethod
    def of_all(cls, counts: Iterable[DeliveryCount]) -> DeliveryCount:
        """Return the sum of `counts`. The part that was measured of a parameter stands for the whole of it."""
        total = cls()
        for count in counts:
            times = count._times
            total._carried += times * count._carried
            total._delta += times * count._delta
            total._noise += times * count._noise
            total._weight += times * count._weight
            total._changed += times * count._changed
            total._standing_for += times * count._standing_for
            total._counted += count._counted
        return total

    @property
    def _times(self) -> float:
        """The number of elements that each one counted stands for."""
        return self._elements / self._counted if self._elements and self._counted else 1.0

    @property
    def moved(self) -> bool:
        """Whether any element that was measured changed."""
        return self._changed > 0

    @property
    def is_known(self) -> bool:
        """Whether the figures mean something: all was measured, or the measured part of an update is neither 0 nor infinite."""
        if self._elements is None:
            return self._counted > 0
        return self._delta > 0 and math.isfinite(self._delta + self._weight + self._noise)

    def delivery(self) -> Delivery:
        """Return the figures, rounded to six decimals.

        The share of an update of zeros is 1, and that of an update whose square overflows is 0.
        """
        return Delivery(
            share=_finite(round(self._carried / self._delta, 6), 0.0) if self._delta else 1.0,
            noise=_finite(round(math.sqrt(self._noise / self._weight), 6), MOST_NOISE) if self._weight else 0.0,
            changed=round(self._changed / self._standing_for, 6) if self._standing_for else 0.0,
            measured=round(self._counted / (self._times * self._standing_for), 6) if self._standing_for else 0.0,
        )


def _finite(figure: float, otherwise: float) -> float:
    return figure if math.isfinite(figure) else otherwise


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the inner product of matrices, summed in fp32 within a row and in fp64 over rows."""
    import torch

    return float(torch.linalg.vecdot(a, b).sum(dtype=torch.float64))
