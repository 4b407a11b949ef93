"""Pruning an AdaLoRA. A triplet is a row of A, a number of E and a column of B; all modules' are ranked together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loratool.errors import AdapterError, LoratoolError, quoted
from loratool.formats.adalora import IMPORTANCE, AdaLoraConfig, pattern_key
from loratool.formats.adapter import Adapter
from loratool.formats.adapter_draft import Draft
from loratool.ranks.factors import factored, load_factors
from loratool.ranks.truncate import targeting
from loratool.ranks.unit_scaling import unit_config
from loratool.updates.low_rank import read_factor

Criterion = Literal["importance", "singular values"]


@dataclass(frozen=True, slots=True)
class Limit:
    """How much of an AdaLoRA to keep.

    Attributes:
        budget: the number of triplets in all modules together.
        average_rank: the number of triplets per module, on average.
        threshold: the score above which a triplet is kept.
    """

    budget: int | None = None
    average_rank: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.budget, self.average_rank, self.threshold) if value is not None]
        if len(given) != 1:
            raise LoratoolError("--budget, --average-rank or --threshold decides what to keep; give one of them")
        if self.budget is not None and type(self.budget) is not int:
            raise LoratoolError(f"the budget is {quoted(self.budget, 40)}; give a whole number of at least 1")
        if not 0 <= given[0] < math.inf:
            raise LoratoolError(f"the limit is {given[0]}; give a finite number of at least 0")

    @property
    def suffix(self) -> str:
        """The suffix of the result's name: ``b64``, ``r2.5`` or ``t0.01``."""
        if self.budget is not None:
            return f"b{self.budget}"
        return f"t{self.threshold:g}" if self.average_rank is None else f"r{self.average_rank:g}"

    def budget_of(self, scores: Sequence[float], modules: int, name: str) -> int:
        """Return how many of the triplets with these `scores` to keep.

        Raises:
            LoratoolError: that is none of them, or more than there are.
        """
        if self.threshold is not None:
            above = sum(score > self.threshold for score in scores)
            if not above:
                raise LoratoolError(
                    f"no triplet of {quoted(name)} scores above {self.threshold:g}; the largest score is {max(scores):g}"
                )
            return above
        if self.average_rank is not None:
            budget, asked = _whole_budget(self.average_rank, modules), f"an average rank of {self.average_rank:g}"
        else:
            budget, asked = self.budget or 0, f"a budget of {self.budget}"
        if not 1 <= budget <= len(scores):
            raise LoratoolError(
                f"{asked} does not fit {quoted(name)}, which has {len(scores)} triplets in {modules} modules; "
                f"give a --budget of 1 to {len(scores)}, or an --average-rank of up to {len(scores) / modules:g}"
            )
        return budget


@dataclass(frozen=True, slots=True)
class Pruning:
    """The triplets to keep.

    Attributes:
        kept: for each module, the ascending places of the triplets to keep; empty for rank 0.
        before: the number of triplets before pruning.
        criterion: the score that ranked them.
        scores: for each module, the scores of the triplets to keep.
    """

    kept: Mapping[str, tuple[int, ...]]
    before: int
    criterion: Criterion
    scores: Mapping[str, tuple[float, ...]]

    @property
    def total(self) -> int:
        """The number of triplets to keep."""
        return sum(map(len, self.kept.values()))


def refuse_no_triplets(adapter: Adapter) -> None:
    """Raise AdapterError if an adapter is no AdaLoRA."""
    if adapter.kind != "adalora":
        raise AdapterError(
            f"{quoted(adapter.name)} is a {adapter.kind}, which has no triplets to prune; use 'loratool truncate --energy'"
        )


def plan_prune(adapter: Adapter, limit: Limit) -> Pruning:
    """Rank the triplets by their importance in training, or by ``|E|`` if none is recorded, and choose the best.

    Triplets of equal score rank by the name of their module, then by their place in it.

    Raises:
        AdapterError: the adapter is not an AdaLoRA, a value is NaN or infinite, or the importance scores do not fit it.
        LoratoolError: the limit keeps no triplet, or more than there are.
    """
    refuse_no_triplets(adapter)
    recorded = adapter.facts.get(IMPORTANCE)
    scores = _singular_values(adapter) if recorded is None else _importance(recorded, adapter)
    triplets = [(-score, module, place) for module, each in scores.items() for place, score in enumerate(each)]
    budget = limit.budget_of([-score for score, _, _ in triplets], len(scores), adapter.name)
    chosen: dict[str, list[int]] = {module: [] for module in scores}
    for _, module, place in sorted(triplets)[:budget]:
        chosen[module].append(place)
    kept = {module: tuple(sorted(places)) for module, places in chosen.items()}
    return Pruning(
        kept,
        len(triplets),
        "singular values" if recorded is None else "importance",
        {module: tuple(scores[module][place] for place in places) for module, places in kept.items()},
    )


def prune(draft: Draft, adapter: Adapter, pruning: Pruning) -> Adapter:
    """Write the AdaLoRA with only the kept triplets, bit for bit, into a draft.

    Raises:
        AdapterError: alpha is not positive. PEFT then scales by the rank, which pruning changes.
    """
    if adapter.alpha is not None and adapter.alpha <= 0:
        raise AdapterError(
            f"the alpha of {quoted(adapter.name)} is {adapter.alpha:g}; PEFT then scales by the rank, which pruning "
            "changes: give --as lora"
        )
    updates = factored(adapter)
    for module, places in pruning.kept.items():
        draft.put_components(module, updates[module].tensors, places)
    return draft.adapter(adapter.name, _pruned_config(adapter, pruning), {})


def prune_to_lora(draft: Draft, adapter: Adapter, pruning: Pruning) -> Adapter:
    """Write the kept triplets as a LoRA into a draft. A takes E and the scaling, in fp32; modules of rank 0 are left out.

    Raises:
        AdapterError: a product overflows fp32.
    """
    ranks = {module: len(places) for module, places in pruning.kept.items() if places}
    updates = factored(adapter)
    for module in ranks:
        factors = load_factors(updates[module])
        places = list(pruning.kept[module])
        a = (factors.a[places].double() * factors.scaling).float()
        if not a.isfinite().all():
            raise AdapterError(f"the factors of {quoted(module)} times its scaling overflow fp32; correct its alpha")
        draft.put(module, a, factors.b[:, places])
    return draft.adapter(adapter.name, unit_config(ranks, targeting(adapter, ranks), adapter.config), {})


def _whole_budget(average_rank: float, modules: int) -> int:
    """The number of whole triplets for an average rank: 29 for 0.29 and 100 modules, though 0.29 * 100 < 29 in fp64."""
    wanted = average_rank * modules
    return math.floor(round(wanted, 9)) if math.isfinite(wanted) else 0


def _singular_values(adapter: Adapter) -> dict[str, list[float]]:
    return {
        module: read_factor(update.tensors["E"]).abs().flatten().tolist()
        for module, update in sorted(factored(adapter).items())
    }


def _importance(recorded: object, adapter: Adapter) -> dict[str, list[float]]:
    """Return the importance scores of each module, and check them, since they come from a file."""
    scores = {}
    for module, update in sorted(factored(adapter).items()):
        found = recorded.get(module) if isinstance(recorded, Mapping) else None
        if (
            not isinstance(found, list)
            or len(found) != update.rank
            or not all(type(score) in (int, float) and math.isfinite(score) for score in found)
        ):
            raise AdapterError(
                f"the importance scores of {quoted(module)} in {quoted(adapter.name)} are not {update.rank} numbers, one "
                "for each triplet; save the adapter again, or remove 'importance' from its facts"
            )
        scores[module] = [float(score) for score in found]
    return scores


def _pruned_config(adapter: Adapter, pruning: Pruning) -> dict[str, Any]:
    """The adapter's configuration with new masks, one for each module, over the components that training began with."""
    adalora = adapter.settings
    assert isinstance(adalora, AdaLoraConfig)
    pattern = {}
    for module, places in sorted(pruning.kept.items()):
        held = [place for place, kept in enumerate(adalora.kept.get(module, (True,) * adalora.init_r)) if kept]
        left = {held[place] for place in places}
        pattern[pattern_key(module)] = [place in left for place in range(adalora.init_r)]
    return {**adapter.config, "rank_pattern": pattern}
