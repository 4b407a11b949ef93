"""How rank b of a DyLoRA is scaled (Valipour et al. 2022, arXiv:2210.07558): its leading components are an update at every rank.

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
from typing import Any, Final, Literal

from loratool.errors import AdapterError, quoted

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
