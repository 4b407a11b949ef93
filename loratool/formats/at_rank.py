"""Adapters whose leading components form an update at every rank (`Kind.nested`), cut to one of their ranks."""

from __future__ import annotations

import math
from dataclasses import replace

from loratool.errors import AdapterError, UnsupportedError, quoted
from loratool.formats.adapter import Adapter, of_weights
from loratool.formats.kinds import KINDS, kind_named
from loratool.formats.lora import lora_settings
from loratool.formats.scaling_law import ScalingLaw, alpha_at, scaling_law
from loratool.updates import Factored, Update
from loratool.updates.low_rank import LowRank


def module_alphas(adapter: Adapter, rank: int, law: ScalingLaw) -> dict[str, tuple[int, float]]:
    """Return rank and alpha of each module of a DyLoRA cut to `rank`; modules of smaller rank are unchanged.

    Raises:
        AdapterError: `rank` is not among the ranks 1..r.
    """
    if not 1 <= rank <= (adapter.rank or 0):
        raise AdapterError(f"{quoted(adapter.name)} has the ranks 1 to {adapter.rank}; {rank} is not one of them")
    lora = lora_settings(adapter)
    return {
        module: (
            min(rank, update.rank),
            alpha_at(lora.alpha_of(module), min(rank, update.rank), update.rank, law, use_rslora=lora.use_rslora),
        )
        for module, update in adapter.ranked.items()
    }


def at_rank(adapter: Adapter, rank: int) -> Adapter:
    """Return a DyLoRA that acts at `rank`; its files are unchanged.

    Raises:
        AdapterError: it is not a DyLoRA, or `rank` is not among the ranks 1..r.
        UnsupportedError: it changes a convolution or an embedding.
    """
    kind = kind_named(adapter.kind)
    if not kind.nested:
        nested = " or ".join(each.title for each in KINDS.values() if each.nested)
        raise AdapterError(
            f"{quoted(adapter.name)} is a {adapter.kind}, not a {nested}, so it acts at its own rank only; make it one of "
            f"another rank with 'loratool truncate'"
        )
    lora = lora_settings(adapter)
    cut = module_alphas(adapter, rank, scaling_law(adapter.facts, adapter.name))
    updates: dict[str, Update] = {}
    for module, update in adapter.ranked.items():
        if not isinstance(update, Factored):
            raise UnsupportedError(
                f"the update of {quoted(module)} in {quoted(adapter.name)} is {quoted(update.kind)}, which is not a product of "
                "two matrices and acts at its own rank only; merge the adapter without a rank"
            )
        least, alpha = cut[module]
        divisor = math.sqrt(least) if lora.use_rslora else least
        updates[module] = LowRank(update.tensors["A"], update.tensors["B"], alpha / divisor, leading=least)
    return replace(adapter, changes={**adapter.changes, **of_weights(updates)})
