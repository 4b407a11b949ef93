"""Several adapters combined into one: planned from headers alone, then computed one module at a time.

The methods and their formulas are in `loratool.ranks.methods`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from loratool.errors import AdapterError, LoratoolError, WrongBaseError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.adapter_draft import Draft
from loratool.ranks.factors import factored, load_factors, refuse_replacements
from loratool.ranks.methods import (
    DRAWING,
    ELECTING,
    METHODS,
    ON_FACTORS,
    PRUNING,
    Method,
    Recipe,
    Term,
    concatenated,
    decomposed,
    digest64,
    mixed,
)
from loratool.updates import Factored, Update
from loratool.updates.low_rank import LARGEST_SCALING

MOST_SEED: Final = 2**64 - 1


@dataclass(frozen=True)
class Share:
    """An adapter and the weight of its update in a combination."""

    adapter: Adapter
    weight: float

    @cached_property
    def updates(self) -> dict[str, Factored]:
        """The adapter's updates, by module; see `factored`."""
        return factored(self.adapter)


@dataclass(frozen=True, slots=True)
class Combination:
    """A plan, made from headers alone.

    Attributes:
        shares: the adapters to combine, in order.
        recipe: the method, with its rank and seed filled in if it has them.
        holders: for each module of the result, the places of the `shares` that have it.
        ranks: the rank of each module of the result.
        notes: remarks for the user.
    """

    shares: tuple[Share, ...]
    recipe: Recipe
    holders: Mapping[str, tuple[int, ...]]
    ranks: Mapping[str, int]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all factors to read."""
        return sum(_nbytes(update) for share in self.shares for update in share.updates.values())


def plan_combine(shares: Sequence[Share], recipe: Recipe) -> Combination:
    """Check that adapters can be combined by a recipe, and plan the result.

    Raises:
        LoratoolError: a number of the recipe is out of range or does not belong to its method, a weight is not finite, an
            adapter is given twice, or there are too few adapters.
        AdapterError: the method needs equal ranks and they differ, or only some of the adapters have kohya's module names.
        WrongBaseError: a module has different shapes in two adapters.
    """
    _check_recipe(recipe, len(shares))
    _check_shares(shares)
    _refuse_other_layouts(shares)
    if recipe.density is not None:
        _refuse_empty(shares, recipe.density)
    modules = sorted({module for share in shares for module in share.updates})
    holders = {
        module: tuple(place for place, share in enumerate(shares) if module in share.updates) for module in modules
    }
    for module, places in holders.items():
        _refuse_other_shapes(module, [shares[place] for place in places])
    if recipe.method == "svd":
        recipe = replace(recipe, rank=_svd_rank(recipe.rank, shares, holders))
    if recipe.method in DRAWING and recipe.seed is None:
        recipe = replace(recipe, seed=_content_seed(shares, recipe))
    ranks = {module: _rank(module, places, shares, recipe) for module, places in holders.items()}
    # A module that all adapters have pruned to rank 0 stays unchanged.
    kept = {module: rank for module, rank in ranks.items() if rank}
    if not kept:
        raise AdapterError("every module of these adapters has rank 0, so there is nothing to combine")
    return Combination(
        tuple(shares),
        recipe,
        {module: holders[module] for module in kept},
        kept,
        _partial_notes(shares, holders),
    )


def combine_into(draft: Draft, plan: Combination, progress: Callable[[int], None] = lambda count: None) -> float | None:
    """Compute every module and put its factors into `draft`, in fp32, for a scaling of 1.

    Return the error of ``svd``: the Frobenius norm of the difference from the exact sum, relative to that of the sum, over
    all modules. Return None for other methods. `progress` is called with the number of bytes of factors processed.

    Raises:
        AdapterError: a factor holds NaN or infinity, or a result overflows fp32.
    """
    lost = total = 0.0
    for module, places in plan.holders.items():
        updates = [plan.shares[place].updates[module] for place in places]
        terms = [
            Term(place, load_factors(update), plan.shares[place].weight)
            for place, update in zip(places, updates, strict=True)
        ]
        rank = plan.ranks[module]
        if plan.recipe.method == "svd":
            a, b, values = decomposed(terms, rank)
            total += float(values.square().sum())
            lost += float(values[rank:].square().sum())
        elif plan.recipe.method == "cat":
            a, b = concatenated(terms)
        else:
            a, b = (mixed(terms, letter, plan.recipe, module) for letter in ("A", "B"))
        if not (a.isfinite().all() and b.isfinite().all()):
            raise AdapterError(f"{quoted(module)} of the result overflows fp32; give the adapters smaller weights")
        draft.put(module, a, b)
        progress(sum(map(_nbytes, updates)))
    if plan.recipe.method != "svd":
        return None
    return math.sqrt(lost / total) if total else 0.0


def _check_recipe(recipe: Recipe, adapters: int) -> None:
    method = recipe.method
    if method not in METHODS:
        raise LoratoolError(f"{quoted(method)} is not a method; use one of {', '.join(METHODS)}")
    if adapters == 0:
        raise LoratoolError("there is nothing to combine; name two adapters or more")
    if method in ELECTING and adapters < 2:
        raise LoratoolError(
            f"{method} lets adapters elect the sign of each number, but only one is given; name two or more"
        )
    _check_belongs("--density", recipe.density, method, PRUNING)
    _check_belongs("--rank", recipe.rank, method, {"svd"})
    _check_belongs("--seed", recipe.seed, method, DRAWING)
    if method in PRUNING and recipe.density is None:
        raise LoratoolError(f"{method} keeps a share of each factor's numbers; give it with --density, such as 0.5")
    if recipe.density is not None and not 0 < recipe.density <= 1:
        raise LoratoolError(f"the density is {recipe.density:g}; give one above 0 and at most 1")
    if recipe.rank is not None and recipe.rank < 1:
        raise LoratoolError(f"the rank is {recipe.rank}; give one of at least 1")
    if recipe.seed is not None and not 0 <= recipe.seed <= MOST_SEED:
        raise LoratoolError(f"the seed is {recipe.seed}; give a whole number from 0 to {MOST_SEED}")


def _check_belongs(option: str, value: float | None, method: Method, methods: Collection[str]) -> None:
    if value is not None and method not in methods:
        raise LoratoolError(f"{option} belongs to {' and '.join(sorted(methods))}, not to {method}; leave it out")


def _check_shares(shares: Sequence[Share]) -> None:
    if all(share.weight == 0 for share in shares):
        raise LoratoolError("every weight is 0, so nothing would be left; give one adapter another weight")
    seen: set[tuple[str, tuple[float, ...]]] = set()
    for share in shares:
        name, scalings = share.adapter.name, tuple(update.scaling for update in share.updates.values())
        if not math.isfinite(share.weight):
            raise LoratoolError(f"the weight of {quoted(name)} is {share.weight} and must be a number")
        largest_scaling = max(abs(scaling * share.weight) for scaling in scalings)
        if largest_scaling > LARGEST_SCALING:
            raise AdapterError(
                f"{quoted(name)} would be multiplied by {largest_scaling:g}, which overflows fp32; give it a smaller weight"
            )
        if (share.adapter.sha256, scalings) in seen:
            raise LoratoolError(f"{quoted(name)} is given twice; give it once, with the sum of the weights")
        seen.add((share.adapter.sha256, scalings))
        refuse_replacements(share.adapter)


def _refuse_other_layouts(shares: Sequence[Share]) -> None:
    """Raise AdapterError if the adapters' layouts spell module names differently."""
    layouts = {share.adapter.layout and share.adapter.layout.format: share.adapter for share in reversed(shares)}
    flat = next((adapter for layout, adapter in layouts.items() if layout is not None), None)
    if len(layouts) > 1 and flat is not None and flat.layout is not None:
        other = next(adapter for adapter in layouts.values() if adapter is not flat)
        raise AdapterError(
            f"{quoted(flat.name)} is in {flat.layout.title}'s layout, which names modules differently than {quoted(other.name)}, "
            "so their modules cannot be matched; combine adapters of one layout"
        )


def _refuse_empty(shares: Sequence[Share], density: float) -> None:
    """Raise LoratoolError if a density keeps no number of some factor."""
    for share in shares:
        for module, update in share.updates.items():
            for letter, info in update.tensors.items():
                numbers = math.prod(info.shape)
                if numbers and density * numbers < 1:
                    raise LoratoolError(
                        f"a density of {density:g} keeps none of the {numbers} numbers of factor {letter} of "
                        f"{quoted(module)} in {quoted(share.adapter.name)}; give a larger --density"
                    )


def _refuse_other_shapes(module: str, shares: Sequence[Share]) -> None:
    first = shares[0]
    for other in shares[1:]:
        shapes = first.updates[module].shape, other.updates[module].shape
        if shapes[0] != shapes[1]:
            raise WrongBaseError(
                f"{quoted(module)} fits a matrix of shape {list(shapes[0])} in {quoted(first.adapter.name)} and "
                f"{list(shapes[1])} in {quoted(other.adapter.name)}, so they are for different bases; combine adapters of one "
                "base"
            )


def _svd_rank(rank: int | None, shares: Sequence[Share], holders: Mapping[str, tuple[int, ...]]) -> int:
    """Return the requested rank, or by default the adapters' largest; raise LoratoolError if no module can have it."""
    if rank is None:
        return max(update.rank for share in shares for update in share.updates.values())
    most = max(_most_rank(module, places, shares) for module, places in holders.items())
    if rank > most:
        raise LoratoolError(
            f"the rank is {rank}, but the sum of these adapters has at most {most}; give a smaller --rank"
        )
    return rank


def _rank(module: str, places: Sequence[int], shares: Sequence[Share], recipe: Recipe) -> int:
    """The rank of one module of the result."""
    ranks = [shares[place].updates[module].rank for place in places]
    if recipe.method in ON_FACTORS:
        if len(set(ranks)) > 1:
            named = zip(ranks, (shares[place].adapter.name for place in places), strict=True)
            listed = ", ".join(f"{rank} in {quoted(name)}" for rank, name in named)
            raise AdapterError(
                f"{recipe.method} adds factors of equal rank, but {quoted(module)} has {listed}; use --method cat for "
                "the exact weighted sum, or svd for its best approximation of one rank"
            )
        return ranks[0]
    if recipe.rank is None:
        return sum(ranks)
    return min(recipe.rank, _most_rank(module, places, shares))


def _most_rank(module: str, places: Sequence[int], shares: Sequence[Share]) -> int:
    """The largest rank that a weighted sum of the updates of `module` can have."""
    updates = [shares[place].updates[module] for place in places]
    return min(sum(update.rank for update in updates), *updates[0].shape)


def _partial_notes(shares: Sequence[Share], holders: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """A note about the modules that only some adapters have."""
    partial = [(module, places) for module, places in holders.items() if len(places) < len(shares)]
    if not partial:
        return ()
    module, places = partial[0]
    without = next(share.adapter.name for place, share in enumerate(shares) if place not in places)
    return (
        f"{len(partial)} of {len(holders)} modules are not in every adapter ({quoted(module)} is not in {quoted(without)}"
        f"{', ...' if partial[1:] else ''}): these are combined from the adapters that have them",
    )


def _content_seed(shares: Sequence[Share], recipe: Recipe) -> int:
    """A seed below 2**64, derived from the adapters and the recipe: equal combinations draw equal numbers."""
    content = [[share.adapter.sha256, float(share.weight).hex()] for share in shares]
    return digest64(json.dumps([content, recipe.method, float(recipe.density or 0).hex()]))


def _nbytes(update: Update) -> int:
    return sum(info.nbytes for info in update.tensors.values())
