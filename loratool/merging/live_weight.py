"""A model in memory whose dense weights take updates, in place, and get their bits back.

The arithmetic is that of a merge of files: fp32 and one rounding. Arithmetic also gives most numbers back, and the bits of the
others are kept: of a trained LoRA some hundredths of the weight. If an update is as large as the weight, whole blocks are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratool.architecture import View
from loratool.checkpoint.dtypes import of_torch
from loratool.checkpoint.header import TensorInfo
from loratool.merging.arithmetic import BlockArithmetic
from loratool.merging.loaded_target import LoadedTarget
from loratool.merging.plan import Target
from loratool.merging.region import Region, RegionalUpdate
from loratool.updates import LoadedUpdate
from loratool.weights.dense import DenseWeight
from loratool.weights.rounding import Rounding

if TYPE_CHECKING:
    import torch

NOWHERE: Final = Path()
"""The file of a tensor that is in none."""


@dataclass(frozen=True)
class LiveModel:
    """A model in memory, as a plan sees it: the parameters by their names in the module, and the configuration.

    Attributes:
        parameters: the tensors that may change, in place.
        config: what ``config.json`` would hold.
    """

    parameters: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The dtype and shape of each parameter. They are in no file."""
        return {name: live_tensor(name, parameter) for name, parameter in self.parameters.items()}

    def merge(self, target: Target) -> LiveWeight:
        """Change a parameter of a plan for this model in place.

        Raises:
            AdapterError: a tensor of the adapter is damaged, or the parameter cannot hold the result.
        """
        parameter = self.parameters[target.name]
        return LiveWeight(parameter, LoadedTarget.of(target, str(parameter.device)))


def live_tensor(name: str, tensor: torch.Tensor) -> TensorInfo:
    """Return the header that a tensor in memory would have in a file."""
    dtype = of_torch(str(tensor.dtype).removeprefix("torch."))
    return TensorInfo(name, dtype.name, tuple(tensor.shape), NOWHERE, 0, tensor.nbytes)


@dataclass(frozen=True, slots=True)
class _Difference:
    """What `restore` needs for a block of rows: the bits of the numbers at `places`, or of all."""

    rows: range
    kept: tuple[bytes, ...]
    places: torch.Tensor | None
    bits: torch.Tensor


class LiveWeight(BlockArithmetic):
    """A dense weight, contiguous or (rows, columns), with updates merged in."""

    def __init__(self, weight: torch.Tensor, target: LoadedTarget) -> None:
        self._tensor = weight.detach()
        if self._tensor.dim() != 2:
            self._tensor = self._tensor.view(target.weight.rows, target.weight.columns)
        super().__init__(target, str(weight.device), beside=False)
        for rows in self.blocks() if self.measures else ():
            self.measure(rows, (self._bytes(rows),))
        self._differences = [self._merge(rows) for rows in self.blocks()]

    @classmethod
    def updated(cls, weight: torch.Tensor, update: LoadedUpdate, *, transposed: bool = False) -> LiveWeight:
        """Merge one update into a weight, (rows, columns). If it is `transposed`, its rows are in_features."""
        stored = DenseWeight(live_tensor("weight", weight))
        updates = (RegionalUpdate(update, Region.of(View(transposed=transposed), stored)),)
        return cls(weight, LoadedTarget(stored, stored, updates, adds=True, rounding=Rounding(0)))

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
