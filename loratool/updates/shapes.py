"""Shapes of updates whose adapter does not tell every dimension of W: a vector of one factor for each output fits any inputs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Final

ANY: Final = 0
"""The size of a dimension that fits any."""


def fits(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Return whether an update of `shape` fits a parameter of the shape `other`."""
    return len(shape) == len(other) and all(own in (ANY, size) for own, size in zip(shape, other, strict=True))


def fits_turned(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Return whether an update of `shape` fits a parameter whose dimensions are those of `other` in any order."""
    if ANY not in shape:
        return sorted(shape) == sorted(other)
    return any(fits(shape, each) for each in permutations(other))


def words(shape: Sequence[int]) -> str:
    """Return a shape for people: ``[64, any]``."""
    return f"[{', '.join(str(size) if size else 'any' for size in shape)}]"
