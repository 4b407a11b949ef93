"""How many workers stream a model."""

from __future__ import annotations

import os
from typing import Final

MOST: Final = 4
"""More workers than this only wait for memory and disk."""


def cpu_workers() -> int:
    """One worker for each core that this process may use, at least two so that reading and arithmetic overlap."""
    return max(2, min(MOST, len(os.sched_getaffinity(0))))
