"""The best low-rank approximation of a difference: exactly, or by a randomized method whose error is measured.

The exact way decomposes the Gram matrix of the smaller side, in fp64. The other finds the leading subspace by subspace
iteration from a random start (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4), until another round finds
hardly more. Whichever it was, the error that is stated is that of the factors themselves: ``D - B A``, measured by one
more pass.
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
"""A matrix whose smaller side is no larger than this is decomposed exactly: that takes a moment."""

OVERSAMPLING: Final = 16
"""So many directions more than asked for are followed, so that the leading ones converge."""

LEAST_SAVING: Final = 8
"""The randomized method pays where the smaller side is so many times its width."""

CONVERGED: Final = 1e-4
"""A round that finds less than this share more of the energy is the last."""

MOST_ROUNDS: Final = 8
FIRST_WIDTH: Final = 64
"""How many directions are followed first where the energy decides the rank."""


@dataclass(frozen=True, slots=True)
class Fit:
    """``B A`` in the place of a difference: A (r, columns), B (rows, r), fp32.

    `energy` is the square of the difference's Frobenius norm, `lost` that of ``D - B A``; `randomized` says how it was
    found.
    """

    a: torch.Tensor
    b: torch.Tensor
    energy: float
    lost: float
    randomized: bool


@dataclass(frozen=True, slots=True)
class Wanted:
    """A `rank`, or the share of the `energy` that the smallest rank must keep, above 0 and at most 1."""

    rank: int | None = None
    share: float | None = None

    def rank_of(self, values: torch.Tensor, energy: float) -> int | None:
        """The rank that is wanted of a difference with these leading singular values; None where they do not suffice."""
        if self.rank is not None:
            return self.rank
        kept = values.square().cumsum(0) >= float(self.share or 0) * energy
        return int(kept.int().argmax()) + 1 if bool(kept.any()) else None


def fit(difference: Difference, wanted: Wanted, seed: int) -> Fit | None:
    """The best factors of the rank that is wanted, or None where there is no difference. `seed` is that of chance."""
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
    """The leading `width` singular triplets, fp64, by rounds of two passes each."""
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
    """The factors of the leading `rank` triplets, and what they miss."""
    u, s, v = found
    a, b = balanced(u[:, :rank], s[:rank], v[:rank])
    return Fit(a, b, energy, difference.residual_energy(b, a), randomized)
