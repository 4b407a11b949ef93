"""DyLoRA (Valipour et al. 2022, arXiv:2210.07558): a low-rank update whose leading components are one at every rank.

Its file is a LoRA's; loratool's facts beside it say that it is a DyLoRA (``kind``), and how its training scaled rank b
(``scaling``):

- ``paper``: ``alpha / b`` (the paper, equation 7). A cut to rank b keeps alpha.
- ``kohya``: ``alpha / r * sqrt(r / b)``, of kohya-ss/sd-scripts, ``networks/dylora.py``. A cut to rank b, which whatever
  loads it scales by its own ``alpha / b``, has the alpha ``alpha * sqrt(b / r)``.

Under rsLoRA both are ``alpha / sqrt(b)``. A cut of either is again a DyLoRA, under the same law.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, Literal

from loratool.errors import AdapterError, quoted
from loratool.formats.adapter import Adapter, of_weights
from loratool.updates import Update
from loratool.updates.low_rank import LowRank

KIND: Final = "dylora"
ScalingLaw = Literal["paper", "kohya"]
LAWS: Final[tuple[ScalingLaw, ...]] = ("paper", "kohya")


def scaling_law(facts: Mapping[str, Any], source: str) -> ScalingLaw:
    """The law that a DyLoRA was trained under, as its facts record it; the paper's where they record none.

    Raises:
        AdapterError: they record another one.
    """
    recorded = facts.get("scaling", "paper")
    for law in LAWS:
        if recorded == law:
            return law
    raise AdapterError(f"{quoted(source)} says that its scaling is {quoted(recorded, 40)}, which is not paper or kohya")


def alpha_at(alpha: float, rank: int, full: int, law: ScalingLaw, *, use_rslora: bool = False) -> float:
    """The alpha of a cut to `rank` of a module of rank `full` with `alpha`."""
    return alpha if law == "paper" or use_rslora or rank == full else alpha * math.sqrt(rank / full)


def module_alphas(adapter: Adapter, rank: int, law: ScalingLaw) -> dict[str, tuple[int, float]]:
    """Rank and alpha of each module of a DyLoRA cut to `rank`; one that has less keeps what it has.

    Raises:
        AdapterError: `rank` is not among the ranks 1..r.
    """
    if not 1 <= rank <= (adapter.rank or 0):
        raise AdapterError(f"{quoted(adapter.name)} has the ranks 1 to {adapter.rank}; {rank} is none of them")
    lora = adapter.settings
    return {
        module: (
            min(rank, update.rank),
            alpha_at(lora.alpha_of(module), min(rank, update.rank), update.rank, law, use_rslora=lora.use_rslora),
        )
        for module, update in adapter.ranked.items()
    }


def at_rank(adapter: Adapter, rank: int) -> Adapter:
    """A DyLoRA that acts at `rank`; its files stay whole.

    Raises:
        AdapterError: it is no DyLoRA, or `rank` is not among the ranks 1..r.
    """
    if adapter.kind != KIND:
        raise AdapterError(
            f"{quoted(adapter.name)} is a {adapter.kind}, not a DyLoRA, so it acts at its own rank only; make it one of "
            f"another rank with 'loratool truncate'"
        )
    lora = adapter.settings
    cut = module_alphas(adapter, rank, scaling_law(adapter.facts, adapter.name))
    updates: dict[str, Update] = {}
    for module, update in adapter.ranked.items():
        least, alpha = cut[module]
        divisor = math.sqrt(least) if lora.use_rslora else least
        updates[module] = LowRank(update.tensors["A"], update.tensors["B"], alpha / divisor, leading=least)
    return replace(adapter, changes={**of_weights(updates), **adapter.replacements})
