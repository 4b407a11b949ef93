"""The methods of PEFT's ``add_weighted_adapter``, with its numbers: from the factors of several adapters those of one.

With weights w and the updates ``scaling * B A`` of n adapters:

- ``cat``: ``A = [w_i scaling_i A_i]`` below one another, ``B = [B_i]`` side by side: the weighted sum, exactly.
- ``svd``: the best approximation of that sum of a given rank, from the factors of ``cat``.
- ``linear``: ``A = sum of sqrt(w_i scaling_i) A_i``, and B alike: it is on the factors, so terms ``B_i A_j`` come in.
- ``magnitude-prune``: linear, of factors of which the largest numbers were kept.
- ``ties``: of those, only the numbers whose sign is that of their sum, averaged (Yadav et al. 2023, arXiv:2306.01708).
- ``dare-linear``, ``dare-ties``: the numbers that are kept are drawn by chance, and the kept ones made larger for those
  that were dropped (Yu et al. 2023, arXiv:2311.03099).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, get_args

from blake3 import blake3

from loratool.ranks.factored_svd import balanced, factored_svd
from loratool.ranks.factors import Factors

if TYPE_CHECKING:
    import torch

Method = Literal["linear", "cat", "svd", "ties", "dare-linear", "dare-ties", "magnitude-prune"]
METHODS: Final[tuple[Method, ...]] = get_args(Method)
PRUNING: Final = frozenset({"ties", "dare-linear", "dare-ties", "magnitude-prune"})
"""Methods that keep a share of each factor's numbers, the density."""

ON_FACTORS: Final = PRUNING | {"linear"}
"""Methods that add A to A and B to B, number by number."""

ELECTING: Final = frozenset({"ties", "dare-ties"})
DRAWING: Final = frozenset({"dare-linear", "dare-ties"})


@dataclass(frozen=True, slots=True)
class Recipe:
    """How adapters are combined.

    Attributes:
        method: one of METHODS.
        density: the share of each factor's numbers that is kept, above 0 and at most 1; for PRUNING methods.
        rank: of the result of ``svd``; by default the largest rank of the adapters.
        seed: of DRAWING methods; by default it is made from what is combined.
    """

    method: Method
    density: float | None = None
    rank: int | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Term:
    """What one adapter, by its `place` among those combined, adds to a module."""

    place: int
    factors: Factors
    weight: float

    @property
    def coefficient(self) -> float:
        """What multiplies ``B A``."""
        return self.weight * self.factors.scaling


def concatenated(terms: Sequence[Term]) -> tuple[torch.Tensor, torch.Tensor]:
    """A (sum of r, in_features) and B (out_features, sum of r), fp32, whose product is the weighted sum."""
    import torch

    a = torch.cat([term.factors.a * term.weight * term.factors.scaling for term in terms])
    return a, torch.cat([term.factors.b for term in terms], dim=1)


def decomposed(terms: Sequence[Term], rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A (rank, in_features) and B (out_features, rank), fp32, nearest to the weighted sum, and its singular values.

    The root of each singular value goes into either factor.
    """
    import torch

    a = torch.cat([term.factors.a.double() * term.coefficient for term in terms])
    u, s, v = factored_svd(torch.cat([term.factors.b for term in terms], dim=1), a)
    return *balanced(u[:, :rank], s[:rank], v[:rank]), s


def mixed(terms: Sequence[Term], letter: str, recipe: Recipe, module: str) -> torch.Tensor:
    """Factor ``A`` or ``B`` of an ON_FACTORS method: the weighted sum, or elected mean, of the sparse factors.

    Each factor is multiplied by the root of its coefficient; a negative sign goes with A.
    """
    import torch

    factors = [term.factors.a if letter == "A" else term.factors.b for term in terms]
    roots = [math.sqrt(abs(term.coefficient)) for term in terms]
    if letter == "A":
        roots = [math.copysign(root, term.coefficient) for root, term in zip(roots, terms, strict=True)]
    if recipe.method in DRAWING:
        seeds = [_draw_seed(recipe, module, letter, term.place) for term in terms]
        factors = [drawn(factor, _density(recipe), seed) for factor, seed in zip(factors, seeds, strict=True)]
    elif recipe.method in PRUNING:
        factors = [largest(factor, _density(recipe)) for factor in factors]
    stacked = torch.stack(factors)
    weighted = stacked * torch.tensor(roots)[:, None, None]
    if recipe.method not in ELECTING:
        return weighted.sum(dim=0)
    elected = torch.where(stacked.sum(dim=0) >= 0, 1, -1)
    agree = stacked.sign() == elected
    return (weighted * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


def largest(factor: torch.Tensor, density: float) -> torch.Tensor:
    """`factor` with the share `density` of its numbers that are largest in magnitude, and zeros."""
    import torch

    kept = torch.topk(factor.abs().flatten(), int(density * factor.numel())).indices
    sparse = torch.zeros_like(factor)
    sparse.view(-1)[kept] = factor.flatten()[kept]
    return sparse


def drawn(factor: torch.Tensor, density: float, seed: int) -> torch.Tensor:
    """`factor` with each number kept by the chance `density`, and divided by it, else 0; same seed, same numbers.

    Chance is the upper 53 bits of the words of Philox4x64 (Salmon et al. 2011) with `seed`, below 2**64, as its key.
    """
    import numpy as np
    import torch

    words = np.random.Philox(key=seed).random_raw(factor.numel()) >> np.uint64(11)
    kept = torch.from_numpy(words * 2.0**-53 < density).view(factor.shape)
    return torch.where(kept, factor / density, 0)


def _draw_seed(recipe: Recipe, module: str, letter: str, place: int) -> int:
    return digest64(f"{recipe.seed} {module} {letter} {place}")


def digest64(text: str) -> int:
    """A seed below 2**64 made from a text: the same everywhere."""
    return int.from_bytes(blake3(text.encode()).digest(8), "little")


def _density(recipe: Recipe) -> float:
    assert recipe.density is not None
    return float(recipe.density)
