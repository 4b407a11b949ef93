"""The properties that all coarse parameters share in a plan."""

from __future__ import annotations

import math
from typing import Final, Self

from loratool.weights.stored import Given

BLOCK_BYTES: Final = 1 << 23
"""The approximate size of a block. Rounding makes many calls per block, so fewer blocks matter more than a cache."""


class CoarseWeight:
    """The properties of `loratool.weights.stored.StoredWeight` for coarse parameters. A storage may override them."""

    __slots__ = ()

    def by_output(self) -> Self:
        """Return itself: coarse parameters are matrices, or stacks of them."""
        return self

    @property
    def turned(self) -> bool:
        return False

    @property
    def row_step(self) -> int:
        return 1

    @property
    def is_oriented(self) -> bool:
        """True: programs that quantize a Conv1D store its transpose."""
        return True

    @property
    def element_bytes(self) -> int:
        """1: an undo file counts codes in bytes, however they are packed."""
        return 1

    @property
    def takes(self) -> Given:
        """``change``: codes move by the change, and W' alone does not determine where in a step it would be."""
        return "change"

    @property
    def limit(self) -> float:
        """Infinity: numbers beyond the outermost levels are cut to these."""
        return math.inf

    @property
    def block_bytes(self) -> int:
        return BLOCK_BYTES

    @property
    def is_computing(self) -> bool:
        return True

    @property
    def undo_level(self) -> int:
        """A high level, because residuals are few but make up most of the undo file."""
        return 15

    @property
    def keeps_hint(self) -> bool:
        return True

    @property
    def is_calibrated(self) -> bool:
        return True

    @property
    def is_replaceable(self) -> bool:
        """False: other numbers would need other scales."""
        return False
