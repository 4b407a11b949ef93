"""How a block is rounded: by which chance, and by whom errors are compensated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from loratool.weights.coarse.block import Block

if TYPE_CHECKING:
    import torch

    from loratool.weights.rounding import Rounding

    Tensor = torch.Tensor

PLAIN: Final = bytes(4)
"""The hint of a block where chance alone decided."""

LARGEST_CHANGE: Final = 0.11
"""Up to this part of the mean step between two levels, on average, errors are passed on between outputs. Beyond, that would
still take off most of the noise, which is small there beside the change, but for an undo file of twice the size, and that of an
update this large is near 8% of the bytes as it is. The blocks of the trained adapters that were measured have 0.103 at most.
"""


@dataclass(frozen=True, slots=True)
class Carriers:
    """Which codes of a block carry its change.

    Attributes:
        chosen: int8, flat: 1 for those that take part.
        gain: fp32, (columns,), how many times its own change each of them carries.
    """

    chosen: Tensor
    gain: Tensor


@dataclass(frozen=True, slots=True)
class Manner:
    """How a block is rounded.

    Attributes:
        words: int16, flat, chance for each code; 0 stands for one half, where a code is rounded to nearest.
        passes: whether errors are passed on between outputs; or for which rows or columns, (rows, 1) or (1, columns).
        hint: what undoing needs to know of it.
        carriers: the codes that carry the change; None where all do.
    """

    words: Tensor
    passes: bool | Tensor
    hint: bytes
    carriers: Carriers | None = None


class Habit(Protocol):
    """Decides how blocks are rounded, and finds out how they were.

    `by_block` says whether what is passed on between outputs begins anew with each block.
    """

    by_block: bool

    def manner(self, block: Block, rounding: Rounding) -> Manner:
        """How a block is to be rounded."""

    def origins(self, block: Block, rounding: Rounding, hint: bytes | None) -> tuple[Tensor, Tensor]:
        """Which codes of a block came from elsewhere, int64, and the places that they came from, int32.

        `hint` is that of the manner, or None where it was not kept. It is as far as chance leads back, asked again.
        """
