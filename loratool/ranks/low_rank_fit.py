"""The best low-rank approximation of a difference: exact, or by a randomized method.

The exact method decomposes the Gram matrix of the smaller side, in fp64. The randomized method finds the leading subspace by
subspace iteration from a random start, until a round gains hardly any energy (Halko, Martinsson and Tropp 2011,
arXiv:0909.4061, algorithm 4.4). After either method, one more pass measures the error of the factors, ``D - B A``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loratool.ranks.difference import Difference
from loratool.ranks.factored_svd import balanced, factored_svd

if TYPE_CHECKING:
    import torch

EXACT_SIDE: Final = 512
"""The largest smaller side for which the exact method is always used, since it is fast there."""

OVERSAMPLING: Final = 16
"""Number of extra directions to iterate on, so that the leading ones converge."""

LEAST_SAVING: Final = 8
"""The randomized method is used while the smaller side is at least this many times its width."""

CONVERGED: Final = 1e-4
"""Iteration stops at a round that gains less than this share of the energy."""

MOST_ROUNDS: Final = 8
FIRST_WIDTH: Final = 64
"""Initial number of directions if the energy decides the rank."""


@dataclass(frozen=True, slots=True)
class Fit:
    """``B A`` as an approximation of a difference D: A (r, columns), B (rows, r), fp32.

    `energy` is the square of D's Frobenius norm, `lost` that of ``D - B A``. `randomized` names the method.
    """

    a: torch.Tensor
    b: torch.Tensor
    energy: float
    lost: float
    randomized: bool


@dataclass(frozen=True, slots=True)
class Wanted:
    """The requested `rank`, or the `share` of the energy to keep, above 0 and at most 1, with the smallest rank."""

    rank: int | None = None
    share: float | None = None

    def rank_of(self, values: torch.Tensor, energy: float) -> int | None:
        """Return the rank to use for these leading singular values; None if they do not reach the share of `energy`."""
        if self.rank is not None:
            return self.rank
        kept = values.square().cumsum(0) >= float(self.share or 0) * energy
        return int(kept.int().argmax()) + 1 if bool(kept.any()) else None


def fit(difference: Difference, wanted: Wanted, seed: int) -> Fit | None:
    """Return the best factors of the requested rank, or None if the difference is zero. `seed` starts the iteration."""
    energy = difference.energy()
    if energy == 0:
        return None
    side = min(difference.shape)
    width = min((wanted.rank or FIRST_WIDTH) + OVERSAMPLING, side)
    while side > EXACT_SIDE and width * LEAST_SAVING <= side:
        u, s, v = _leading_subspace(difference, width, energy, wanted, seed)
        rank = wanted.rank_of(s[: width - OVERSAMPLING], energy)
        if rank is not None:
            return _measured(difference, (u, s, v), rank, energy, randomized=True)
        width *= 2
    u, s, v, rank = _exact(difference, energy, wanted)
    return _measured(difference, (u, s, v), rank, energy, randomized=False)


Decomposition = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]


def _exact(
    difference: Difference, energy: float, wanted: Wanted
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    import torch

    values, vectors = torch.linalg.eigh(difference.gram())
    rank = wanted.rank_of(values.flip(0).clamp(min=0).sqrt(), energy) or len(values)
    basis = vectors.flip(1)[:, :rank]
    rows, columns = difference.shape
    if columns <= rows:
        return *factored_svd(difference.times(basis), basis.T), rank
    return *factored_svd(basis, difference.transposed_times(basis).T), rank


def _leading_subspace(difference: Difference, width: int, energy: float, wanted: Wanted, seed: int) -> Decomposition:
    """Return about the leading `width` singular triplets, fp64. Each round reads the difference twice."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(difference.times(torch.randn(difference.shape[1], width, generator=generator))).Q
    found = -math.inf
    for _ in range(MOST_ROUNDS):
        across = difference.transposed_times(basis)
        u, s, v = factored_svd(basis, across.T)
        kept = float(s[: wanted.rank or width].square().sum()) / energy
        if kept - found < CONVERGED:
            break
        found = kept
        basis = torch.linalg.qr(difference.times(torch.linalg.qr(across).Q)).Q
    return u, s, v


def _measured(difference: Difference, found: Decomposition, rank: int, energy: float, *, randomized: bool) -> Fit:
    """Return the factors of the leading `rank` triplets, with their measured error."""
    u, s, v = found
    a, b = balanced(u[:, :rank], s[:rank], v[:rank])
    return Fit(a, b, energy, difference.residual_energy(b, a), randomized)
