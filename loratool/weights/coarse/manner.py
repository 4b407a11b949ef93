"""How a block is rounded: its random numbers, its error compensation, and the codes that carry the change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from loratool.weights.coarse.block import Block

if TYPE_CHECKING:
    import torch

    from loratool.weights.rounding import Rounding

    Tensor = torch.Tensor

PLAIN: Final = bytes(4)
"""The hint of a block in which every code is rounded by its own random number."""

LARGEST_CHANGE: Final = 0.11
"""The largest mean change, in units of the mean step between levels, for which errors are compensated between outputs.

For larger changes, compensation would still remove most of the noise, but there the noise is small relative to the change, and
the undo file would double in size from nearly 8% of the bytes. Blocks of the trained adapters that were measured have at most
0.103.
"""


@dataclass(frozen=True, slots=True)
class Carriers:
    """The codes of a block that carry its change.

    Attributes:
        chosen: int8, flat: 1 for the codes that carry.
        gain: (columns,) fp32, the multiple of its own change that each of them carries.
    """

    chosen: Tensor
    gain: Tensor


@dataclass(frozen=True, slots=True)
class Manner:
    """How a block is rounded.

    Attributes:
        words: int16, flat, a random word for each code; 0 means one half, which rounds to nearest.
        passes: whether errors are compensated between outputs, or a mask of rows or columns, (rows, 1) or (1, columns).
        hint: the hint that undoing needs.
        carriers: the codes that carry the change; None if all do.
    """

    words: Tensor
    passes: bool | Tensor
    hint: bytes
    carriers: Carriers | None = None


class Habit(Protocol):
    """Decides how blocks are rounded, and finds the origins of their codes when that is undone.

    Attributes:
        by_block: whether error compensation between outputs begins anew with each block.
    """

    by_block: bool

    def manner(self, block: Block, rounding: Rounding) -> Manner:
        """Return how a block is to be rounded."""

    def origins(self, block: Block, rounding: Rounding, hint: bytes | None) -> tuple[Tensor, Tensor]:
        """Return the positions of codes that were changed, int64, and their places before, int32.

        These are the changes that the same random numbers reveal; some may be missing or wrong. `hint` is that of the manner,
        or None if it was not kept.
        """
