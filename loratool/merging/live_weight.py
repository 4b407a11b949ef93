"""A dense weight of a model in memory that an update is merged into, in place, and that gets its bits back.

The arithmetic is that of a merge of files: fp32 and one rounding. Arithmetic also gives most numbers back, and the bits of the
others are kept: of a trained LoRA some hundredths of the weight. If an update is as large as the weight, whole blocks are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loratool.architecture import View
from loratool.checkpoint.dtypes import of_torch
from loratool.checkpoint.header import TensorInfo
from loratool.merging.arithmetic import BlockArithmetic
from loratool.merging.loaded_target import LoadedTarget
from loratool.merging.region import Region, RegionalUpdate
from loratool.updates import LoadedUpdate
from loratool.weights.dense import DenseWeight
from loratool.weights.rounding import Rounding

if TYPE_CHECKING:
    import torch

NOWHERE: Final = Path()
"""The file of a tensor that is in none."""


@dataclass(frozen=True, slots=True)
class _Difference:
    """What `restore` needs for a block of rows: the bits of the numbers at `places`, or of all."""

    rows: range
    kept: tuple[bytes, ...]
    places: torch.Tensor | None
    bits: torch.Tensor


class LiveWeight(BlockArithmetic):
    """A dense weight, (rows, columns), with an update merged in. `transposed`: its rows are in_features."""

    def __init__(self, weight: torch.Tensor, update: LoadedUpdate, *, transposed: bool = False) -> None:
        self._tensor = weight.detach()
        dtype = of_torch(str(weight.dtype).removeprefix("torch."))
        stored = DenseWeight(TensorInfo("weight", dtype.name, tuple(weight.shape), NOWHERE, 0, weight.nbytes))
        updates = (RegionalUpdate(update, Region.of(View(transposed=transposed), stored)),)
        super().__init__(
            LoadedTarget(stored, stored, updates, adds=True, rounding=Rounding(0)), str(weight.device), beside=False
        )
        for rows in self.blocks() if self.measures else ():
            self.measure(rows, (self._bytes(rows),))
        self._differences = [self._merge(rows) for rows in self.blocks()]

    @property
    def measures(self) -> bool:
        return any(update.measures_whole for update in self._updates)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept for `restore`, without the factors."""
        kept = [tensor for part in self._differences for tensor in (part.places, part.bits) if tensor is not None]
        return sum(tensor.nbytes for tensor in kept)

    def restore(self) -> None:
        """Give the weight the bits that it had."""
        for part in self._differences:
            raw = self._bytes(part.rows)
            bits = self._bits(raw)
            if part.places is None:
                bits.copy_(part.bits)
            else:
                self._kept = list(part.kept)
                self.revert(part.rows, (raw,), None)
                bits[part.places.long()] = part.bits
            self._put(part.rows, raw)

    def _merge(self, rows: range) -> _Difference:
        """Merge the update into a block of rows, and return what its undo needs."""
        raw = self._bytes(rows)
        original = self._bits(raw).clone()
        self.apply(rows, (raw,))
        self._put(rows, raw)
        predicted = raw.clone()
        self.revert(rows, (predicted,), None)
        places = (self._bits(predicted) != original).nonzero().squeeze(1).int()
        if places.nbytes + len(places) * original.itemsize >= original.nbytes:
            return _Difference(rows, (), None, original)
        return _Difference(rows, tuple(self._kept), places, original[places.long()])

    def _bytes(self, rows: range) -> torch.Tensor:
        """Return the bytes of some rows, which share the weight's memory if that is contiguous."""
        import torch

        return self._tensor[rows.start : rows.stop].contiguous().view(-1).view(torch.uint8)

    def _bits(self, raw: torch.Tensor) -> torch.Tensor:
        """Return bytes as whole numbers of the size of the weight's."""
        import torch

        return raw.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[self._tensor.itemsize])

    def _put(self, rows: range, raw: torch.Tensor) -> None:
        """Write the bytes of some rows unless they share the weight's memory."""
        block = self._tensor[rows.start : rows.stop]
        if block.data_ptr() != raw.data_ptr():
            block.copy_(raw.view(self._tensor.dtype).view(block.shape))
