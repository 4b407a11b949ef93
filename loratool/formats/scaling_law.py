"""Scaling of a DyLoRA at rank b (Valipour et al. 2022, arXiv:2210.07558), whose leading components form an update at every rank.

Its file is a LoRA's; loratool's facts beside it record that it is a DyLoRA (``kind``), and how its training scaled rank b
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
    """Return the law that a DyLoRA was trained under, from its facts; the paper's if they record none.

    Raises:
        AdapterError: they record an unknown law.
    """
    recorded = facts.get("scaling", "paper")
    for law in LAWS:
        if recorded == law:
            return law
    raise AdapterError(f"{quoted(source)} says that its scaling is {quoted(recorded, 40)}, which is not paper or kohya")


def alpha_at(alpha: float, rank: int, full: int, law: ScalingLaw, *, use_rslora: bool = False) -> float:
    """Return the alpha of a module of rank `full` with `alpha` after a cut to `rank`."""
    return alpha if law == "paper" or use_rslora or rank == full else alpha * math.sqrt(rank / full)
