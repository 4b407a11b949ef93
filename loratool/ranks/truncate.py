"""An adapter cut to a lower rank: a DyLoRA to its leading components, any other to its best approximation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from loratool.errors import AdapterError, LoratoolError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.adapter_draft import Draft
from loratool.formats.at_rank import module_alphas
from loratool.formats.kinds import NESTED_LORA, kind_named
from loratool.formats.lora import lora_settings
from loratool.formats.lora_config import lora_config
from loratool.formats.scaling_law import ScalingLaw
from loratool.ranks.factored_svd import balanced, factored_svd
from loratool.ranks.factors import factored, load_factors
from loratool.ranks.parallel import in_parallel
from loratool.ranks.unit_scaling import TARGETING, unit_config

if TYPE_CHECKING:
    import torch

NO_ENERGY: Final = 1e-24
"""The share of the energy below which components are rounding errors of fp64."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How far to cut an adapter: to a `rank`, or to the smallest rank of each module that satisfies `energy` or `error`.

    Attributes:
        rank: the rank to cut to.
        energy: the least share to keep of the sum of a module's squared singular values.
        error: the largest Frobenius norm of what is lost, relative to that of the update.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.rank, self.energy, self.error) if value is not None]
        if len(given) != 1:
            raise LoratoolError("--rank, --energy or --error decides where to cut; give one of them")
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise LoratoolError(f"the rank is {quoted(self.rank, 40)}; give a whole number of at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise LoratoolError(f"the energy is {self.energy:g}; give a share above 0 and at most 1, such as 0.95")
        if self.error is not None and not 0 <= self.error < 1:
            raise LoratoolError(f"the error is {self.error:g}; give one from 0 to below 1, such as 0.01")

    @property
    def suffix(self) -> str:
        """The suffix of the result's name: ``r4``, ``energy0.95`` or ``error0.01``."""
        if self.rank is not None:
            return f"r{self.rank}"
        return f"error{self.error:g}" if self.energy is None else f"energy{self.energy:g}"

    @property
    def figures(self) -> dict[str, float]:
        """The value given, under its name on the command line."""
        asked = {"rank": self.rank, "energy": self.energy, "error": self.error}
        return {key: value for key, value in asked.items() if value is not None}

    def rank_of(self, values: torch.Tensor) -> int:
        """Return the rank to cut a module with these singular values to, largest first; at least 1."""
        if self.rank is not None:
            return min(self.rank, len(values))
        lost = values.square().flip(0).cumsum(0).flip(0)
        allowed = 1 - self.energy if self.energy is not None else float(self.error or 0) ** 2
        return max(1, int((lost > max(allowed, NO_ENERGY) * lost[0]).sum()))


@dataclass(frozen=True, slots=True)
class Truncation:
    """An adapter of lower rank, in a draft.

    Attributes:
        adapter: the result. Write it while the draft is open.
        errors: each module's error after a cut by SVD.
        error: the Frobenius norm of what is lost, relative to that of the update, over all modules. None for a DyLoRA,
            whose lower ranks do not approximate its highest.
    """

    adapter: Adapter
    errors: Mapping[str, float]
    error: float | None


def truncate_leading(draft: Draft, adapter: Adapter, rank: int, law: ScalingLaw) -> Truncation:
    """Cut a DyLoRA to `rank`: the leading slices of its factors, bit for bit, with the scaling law of its training.

    Raises:
        AdapterError: the adapter was not trained at `rank`, or its components have no order, as those of an AdaLoRA.
    """
    updates, kind = factored(adapter), kind_named(adapter.kind)
    if any(set(update.tensors) != {"A", "B"} for update in updates.values()):
        raise AdapterError(
            f"{quoted(adapter.name)} is {kind.article} {kind.title}, whose components have no order; leave --scaling out, or "
            "use 'loratool prune'"
        )
    modules = module_alphas(adapter, rank, law)
    for module, (kept, _) in modules.items():
        draft.put_components(module, updates[module].tensors, range(kept))
    config = lora_config(modules, adapter.config, use_rslora=lora_settings(adapter).use_rslora)
    cut = draft.adapter(adapter.name, config, {})
    return Truncation(replace(cut, kind=NESTED_LORA, layout=adapter.layout), {}, None)


def truncate_by_svd(drafts: Sequence[Draft], adapter: Adapter, cuts: Sequence[Cut],
                    progress: Callable[[int], None] = lambda count: None) -> list[Truncation]:  # fmt: skip
    """Cut a low-rank adapter to each of `cuts`, into one draft each, by each module's best approximation.

    The factors are fp32, for a scaling of 1. `progress` is called with the number of bytes of factors processed.

    Raises:
        UnsupportedError: an update is not a product of factors.
        AdapterError: a rank is above the adapter's, a value is NaN or infinite, or every module has rank 0.
    """
    for cut in cuts:
        if cut.rank is not None and cut.rank > (adapter.rank or 0):
            raise AdapterError(f"{quoted(adapter.name)} has rank {adapter.rank}, so it cannot be cut to {cut.rank}")
    present = {module: update for module, update in factored(adapter).items() if update.rank}
    if not present:
        raise AdapterError(f"every module of {quoted(adapter.name)} has rank 0, so there is nothing to cut")

    def cut_module(module: str) -> tuple[torch.Tensor, list[int]]:
        update = present[module]
        factors = load_factors(update)
        u, s, v = factored_svd(factors.b, factors.a)
        ranks = [cut.rank_of(s) for cut in cuts]
        for draft, rank in zip(drafts, ranks, strict=True):
            draft.put(module, *_scaled(module, factors.scaling, u[:, :rank], s[:rank], v[:rank]))
        progress(sum(info.nbytes for info in update.tensors.values()))
        return s * abs(factors.scaling), ranks

    found = dict(zip(present, in_parallel(cut_module, present), strict=True))
    return [
        _truncation(draft, adapter, {module: (values, ranks[place]) for module, (values, ranks) in found.items()})
        for place, draft in enumerate(drafts)
    ]


def _scaled(
    module: str, scaling: float, u: torch.Tensor, s: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (r, in_features) and B (out_features, r), fp32, whose product is ``scaling * U diag(s) V``."""
    a, b = balanced(u * math.copysign(1, scaling), s * abs(scaling), v)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise AdapterError(f"the factors of {quoted(module)} times its scaling overflow fp32; correct its alpha")
    return a, b


def _truncation(draft: Draft, source: Adapter, modules: Mapping[str, tuple[torch.Tensor, int]]) -> Truncation:
    """Return the truncation in `draft`. `modules` holds each module's singular values and the rank it was cut to."""
    ranks = {module: rank for module, (_, rank) in modules.items()}
    totals = {module: float(values.square().sum()) for module, (values, _) in modules.items()}
    lost = {module: float(values[rank:].square().sum()) for module, (values, rank) in modules.items()}
    cut = draft.adapter(source.name, unit_config(ranks, targeting(source, ranks), source.config), {})
    return Truncation(
        replace(cut, layout=source.layout),
        {module: _relative(lost[module], total) for module, total in totals.items()},
        _relative(sum(lost.values()), sum(totals.values())),
    )


def _relative(lost: float, total: float) -> float:
    """The relative Frobenius norm of what is lost, from squared norms."""
    return math.sqrt(lost / total) if total else 0.0


def targeting(source: Adapter, modules: Mapping[str, object]) -> dict[str, Any]:
    """Return the configuration keys that say which modules an adapter made from `source` changes and which it replaces.

    They are those of `source`, or the full names of `modules` if it lacks some modules of `source`.
    """
    whole = {"modules_to_save": source.config["modules_to_save"]} if source.replacements else {}
    if set(source.modules) != modules.keys():
        return {"target_modules": sorted(modules)} | whole
    return {key: source.config[key] for key in TARGETING if source.config.get(key) is not None} | whole
