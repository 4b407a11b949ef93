"""Measurement of how much of an update survives in a storage whose steps are larger than the update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    import torch

    from loratool.weights.code_moves import Moves

LEAST_SHARE: Final = 0.9
"""Share of an update below which a merge gets a warning."""


MOST_NOISE: Final = 1e18
"""Value of noise whose square overflows fp32."""


@dataclass(frozen=True, slots=True)
class Survival:
    """How much of an update, delta, was delivered to one matrix or to several.

    Attributes:
        share: the projection of the stored change on delta, ``<W' - W, delta> / <delta, delta>``: 1 if the whole update is
            there, 0 if it is lost.
        noise: root mean square of ``W' - W - delta``, in units of that of W.
        changed: the share of codes that changed.
    """

    share: float
    noise: float
    changed: float

    def to_json(self) -> dict[str, float]:
        return {"share": self.share, "noise": self.noise, "changed": self.changed}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Parse what `to_json` returned; raise KeyError, TypeError or ValueError for anything else."""
        numbers = [value[key] for key in ("share", "noise", "changed")]
        if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
            raise ValueError(value)
        return cls(*map(float, numbers))


class SurvivalCount:
    """Sums over the blocks of one or several matrices, from which a `Survival` is computed."""

    def __init__(self) -> None:
        self._carried = self._delta = self._noise = self._weight = 0.0
        self._changed = self._elements = 0

    def add(self, before: torch.Tensor, wanted: torch.Tensor, after: torch.Tensor) -> None:
        """Count a block: the decoded W, W + delta, and the decoded W'. The last two are overwritten."""
        self._changed += int((after != before).sum())
        self._elements += before.numel()
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
        self._elements += delta.numel()
        self._weight += moves.squares
        self._carried += carried
        self._delta += delta_squared
        self._noise += max(float(jumps @ jumps) - 2 * carried + delta_squared, 0.0)

    @classmethod
    def of_all(cls, counts: Iterable[SurvivalCount]) -> SurvivalCount:
        """Return the sum of `counts`."""
        total = cls()
        for count in counts:
            for name, value in vars(count).items():
                setattr(total, name, getattr(total, name) + value)
        return total

    @property
    def moved(self) -> bool:
        """Whether any code changed."""
        return self._changed > 0

    def survival(self) -> Survival:
        """Return the figures, rounded to six decimals.

        The share of an update of zeros is 1, and that of an update whose square overflows is 0.
        """
        return Survival(
            share=_finite(round(self._carried / self._delta, 6), 0.0) if self._delta else 1.0,
            noise=_finite(round(math.sqrt(self._noise / self._weight), 6), MOST_NOISE) if self._weight else 0.0,
            changed=round(self._changed / self._elements, 6) if self._elements else 0.0,
        )


def _finite(figure: float, default: float) -> float:
    return figure if math.isfinite(figure) else default


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the inner product of matrices, summed in fp32 within a row and in fp64 over rows."""
    import torch

    return float(torch.linalg.vecdot(a, b).sum(dtype=torch.float64))
