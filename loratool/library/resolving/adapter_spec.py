"""An adapter as an argument: its name or path, optionally with a weight that multiplies its update."""

from __future__ import annotations

import math
import os

from loratool.errors import LoratoolError, quoted

PathLike = str | os.PathLike[str]
AdapterSpec = PathLike | tuple[PathLike, float]
"""An adapter's name or path, optionally with its weight."""


def with_weight(spec: AdapterSpec) -> tuple[str | os.PathLike[str], float]:
    """Return an adapter's name or path, and its weight, by default 1.

    Raises:
        LoratoolError: `spec` is not an adapter, or the weight is not a finite number.
    """
    name, weight = spec if isinstance(spec, tuple) and len(spec) == 2 else (spec, 1.0)
    if not isinstance(name, str | os.PathLike):
        raise LoratoolError(f"{quoted(spec)} is not an adapter; give a name or a path, or (name, weight)")
    if not isinstance(weight, int | float) or not math.isfinite(weight):
        raise LoratoolError(f"the weight of {quoted(name)} is {quoted(weight)} and must be a number")
    return name, float(weight)
