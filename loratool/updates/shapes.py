"""Shapes of updates whose adapter does not tell every dimension of W: a vector of one factor for each output fits any inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Final

from loratool.updates import SizedUpdate, Update

ANY: Final = 0
"""The size of a dimension that fits any."""


MATRIX: Final = 2
"""The number of dimensions of a matrix."""


def fits(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Return whether an update of `shape` fits a parameter of the shape `other`.

    A matrix of known sizes also fits a convolution's weights, (out_channels, in_channels, k...), with a row for each output; and
    sizes of 1 at the end are as good as none.
    """
    while len(shape) > max(len(other), MATRIX) and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) == MATRIX < len(other) and ANY not in shape:
        other = (other[0], math.prod(other[1:]))
    return len(shape) == len(other) and all(own in (ANY, size) for own, size in zip(shape, other, strict=True))


def sized(update: Update, shape: tuple[int, ...]) -> Update:
    """Return the update of a parameter of this shape, which it fits; raises AdapterError like `SizedUpdate.sized`."""
    return update.sized(shape) if isinstance(update, SizedUpdate) else update


def fits_turned(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Return whether an update of `shape` fits a parameter whose dimensions are those of `other` in any order."""
    if ANY not in shape:
        return sorted(shape) == sorted(other) or fits(shape, other)
    return any(fits(shape, each) for each in permutations(other))


def words(shape: Sequence[int]) -> str:
    """Return a shape for people: ``[64, any]``."""
    return f"[{', '.join(str(size) if size else 'any' for size in shape)}]"
