"""An update in a live model's weight, and out of it again, bit for bit.

The weight takes the update in fp32 and one rounding, as a merge of files does. Taking it out by arithmetic gives most numbers
back; which it does not, and their bits, is kept: of a trained LoRA some hundredths of the weight. Where that would be more
than a block of the weight itself, because the update is as large, the block is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from loratool.updates import LoadedUpdate

BLOCK: Final = 2**22
"""Numbers that are computed in fp32 at once."""

_BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class _Difference:
    """The bits of a block of rows: all of them, or those at `places` of it."""

    rows: range
    places: Tensor | None
    bits: Tensor


class MergedWeight:
    """A dense weight, (rows, columns), that an update was added to, in place; `restore` takes it out."""

    def __init__(self, weight: Tensor, update: LoadedUpdate) -> None:
        self._weight, self._update = weight.detach(), update
        rows, columns = weight.shape
        step = max(1, BLOCK // columns)
        self._differences = [self._add(range(start, min(start + step, rows))) for start in range(0, rows, step)]

    @property
    def nbytes(self) -> int:
        """What is kept for `restore`, in bytes, the factors apart."""
        kept = [tensor for part in self._differences for tensor in (part.places, part.bits) if tensor is not None]
        return sum(tensor.nbytes for tensor in kept)

    @torch.no_grad()
    def restore(self) -> None:
        """Give the weight the bits that it had."""
        for part in self._differences:
            block = self._block(part.rows)
            bits = block.view(_BITS[block.itemsize]).view(-1)
            if part.places is None:
                bits.copy_(part.bits)
            else:
                block.copy_(self._reverted(part.rows))
                bits[part.places.long()] = part.bits

    @torch.no_grad()
    def _add(self, rows: range) -> _Difference:
        block = self._block(rows)
        original = block.view(_BITS[block.itemsize]).flatten().clone()
        changed = block.float()
        self._update.apply(changed, rows, torch.empty_like(changed))
        block.copy_(changed)
        found = self._reverted(rows).view(original.dtype).flatten()
        places = (found != original).nonzero().squeeze(1).int()
        if places.nbytes + len(places) * original.itemsize >= original.nbytes:
            return _Difference(rows, None, original)
        return _Difference(rows, places, original[places.long()])

    def _reverted(self, rows: range) -> Tensor:
        block = self._block(rows)
        numbers = block.to(torch.float32, copy=True)
        self._update.revert(numbers, rows, torch.empty_like(numbers), b"")
        return numbers.to(block.dtype)

    def _block(self, rows: range) -> Tensor:
        return self._weight[rows.start : rows.stop]
