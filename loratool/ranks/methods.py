"""The methods of PEFT's ``add_weighted_adapter``, which combine the factors of several adapters into those of one.

The results equal PEFT's. With weights w and the updates ``scaling * B A`` of n adapters:

- ``cat``: stacks the rows ``w_i scaling_i A_i`` into A and the columns ``B_i`` into B. This is the exact weighted sum.
- ``svd``: approximates that sum with a given rank, from the factors of ``cat``.
- ``linear``: ``A = sum of sqrt(w_i scaling_i) A_i``, and the same for B. It adds factors, so ``B A`` has cross terms
  ``B_i A_j``.
- ``magnitude-prune``: linear, after only the largest numbers of each factor are kept.
- ``ties``: magnitude-prune, but averages only the numbers whose sign agrees with that of their sum (Yadav et al. 2023,
  arXiv:2306.01708).
- ``dare-linear``, ``dare-ties``: keep numbers at random instead, and divide them by the density (Yu et al. 2023,
  arXiv:2311.03099).
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
"""Methods that keep only a share of each factor's numbers, the density."""

ON_FACTORS: Final = PRUNING | {"linear"}
"""Methods that add A to A and B to B, number by number."""

ELECTING: Final = frozenset({"ties", "dare-ties"})
DRAWING: Final = frozenset({"dare-linear", "dare-ties"})


@dataclass(frozen=True, slots=True)
class Recipe:
    """How adapters are combined.

    Attributes:
        method: one of METHODS.
        density: the share of each factor's numbers to keep, above 0 and at most 1; for PRUNING methods.
        rank: the rank of the result of ``svd``; by default the adapters' largest.
        seed: the random seed of DRAWING methods; by default derived from the adapters and the recipe.
    """

    method: Method
    density: float | None = None
    rank: int | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Term:
    """The contribution of one adapter to a module. `place` is its position among the adapters."""

    place: int
    factors: Factors
    weight: float

    @property
    def coefficient(self) -> float:
        """The factor on ``B A``: weight times scaling."""
        return self.weight * self.factors.scaling


def concatenated(terms: Sequence[Term]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (sum of r, in_features) and B (out_features, sum of r), fp32, whose product is the weighted sum."""
    import torch

    a = torch.cat([term.factors.a * term.weight * term.factors.scaling for term in terms])
    return a, torch.cat([term.factors.b for term in terms], dim=1)


def decomposed(terms: Sequence[Term], rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return A (rank, in_features) and B (out_features, rank), fp32, and the singular values of the weighted sum.

    ``B A`` is the best approximation of the sum. Each factor takes the square roots of the singular values.
    """
    import torch

    a = torch.cat([term.factors.a.double() * term.coefficient for term in terms])
    u, s, v = factored_svd(torch.cat([term.factors.b for term in terms], dim=1), a)
    return *balanced(u[:, :rank], s[:rank], v[:rank]), s


def mixed(terms: Sequence[Term], letter: str, recipe: Recipe, module: str) -> torch.Tensor:
    """Return factor ``A`` or ``B`` of an ON_FACTORS method: the weighted sum or the elected mean of the adapters' factors.

    Each factor is multiplied by the square root of its coefficient's magnitude. A takes the sign.
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
    """Return `factor` with only its largest numbers in magnitude, a share `density` of them; the others are 0."""
    import torch

    kept = torch.topk(factor.abs().flatten(), int(density * factor.numel())).indices
    sparse = torch.zeros_like(factor)
    sparse.view(-1)[kept] = factor.flatten()[kept]
    return sparse


def drawn(factor: torch.Tensor, density: float, seed: int) -> torch.Tensor:
    """Return `factor` with each number kept with probability `density` and divided by it; the others are 0.

    The random numbers are the upper 53 bits of the words of Philox4x64 (Salmon et al. 2011), with `seed`, below 2**64, as its
    key. Equal seeds give equal results.
    """
    import numpy as np
    import torch

    words = np.random.Philox(key=seed).random_raw(factor.numel()) >> np.uint64(11)
    kept = torch.from_numpy(words * 2.0**-53 < density).view(factor.shape)
    return torch.where(kept, factor / density, 0)


def _draw_seed(recipe: Recipe, module: str, letter: str, place: int) -> int:
    return digest64(f"{recipe.seed} {module} {letter} {place}")


def digest64(text: str) -> int:
    """Return a seed below 2**64 derived from `text`, the same on every machine."""
    return int.from_bytes(blake3(text.encode()).digest(8), "little")


def _density(recipe: Recipe) -> float:
    assert recipe.density is not None
    return float(recipe.density)
