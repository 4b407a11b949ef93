"""What all coarse parameters have in common, as a plan holds them."""

from __future__ import annotations

import math
from typing import Final

from loratool.weights.stored import Given

BLOCK_BYTES: Final = 1 << 23
"""Much is done with a block: fewer calls are worth more than a cache."""


class CoarseWeight:
    """The answers of a coarse parameter to those who merge (`loratool.weights.stored`), unless it has others."""

    __slots__ = ()

    @property
    def turned(self) -> bool:
        return False

    @property
    def row_step(self) -> int:
        return 1

    @property
    def is_oriented(self) -> bool:
        """Those who quantize a Conv1D turn it."""
        return True

    @property
    def element_bytes(self) -> int:
        """Codes are counted in bytes, whatever they are packed in."""
        return 1

    @property
    def takes(self) -> Given:
        """Codes move by what is added; what W was in its step is not in W'."""
        return "change"

    @property
    def limit(self) -> float:
        """What is beyond the outermost level comes to it."""
        return math.inf

    @property
    def block_bytes(self) -> int:
        return BLOCK_BYTES

    @property
    def is_computing(self) -> bool:
        return True

    @property
    def undo_level(self) -> int:
        """Little is stored, and what there is is much of the file."""
        return 15

    @property
    def keeps_hint(self) -> bool:
        return True

    @property
    def is_calibrated(self) -> bool:
        return True

    @property
    def is_replaceable(self) -> bool:
        """Other numbers need other scales."""
        return False
