"""What updates have in common that add a matrix to W which does not depend on W: W' = W + scaling * D.

A kind of this sort is one file: its plan form extends `Additive`, and `delta` returns its numbers as a `Delta`, from which any
part of D can be computed alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from loratool.checkpoint.header import TensorInfo
from loratool.updates.low_rank import checked_scaling, read_factor
from loratool.updates.zeros import only_zeros

if TYPE_CHECKING:
    import torch


class Delta(Protocol):
    """The matrix D, (out_features, in_features), whose numbers are in memory. Its parts are fp32 or fp64, on its device."""

    def part(self, outputs: slice, inputs: slice) -> torch.Tensor:
        """Return a part of D, fp32, computed in PEFT's order. Both slices have a start and a stop."""

    def fixed(self, outputs: slice, inputs: slice) -> torch.Tensor:
        """Return the same part with the same bits on every machine, whatever the part: without sums in a BLAS's order."""


@dataclass(frozen=True, slots=True)
class Additive(ABC):
    """W' = W + scaling * D, in a plan. `tensors` are those that D is made from, by the letters of the paper."""

    tensors: Mapping[str, TensorInfo]
    scaling: float = 1.0
    needs_weight: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    scalable: ClassVar[bool] = True

    @property
    @abstractmethod
    def kind(self) -> str:
        """The name of the method, with its size."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of D: (out_features, in_features)."""

    @property
    def factors(self) -> tuple[str, ...]:
        """The letters of the tensors of which one that is all zeros makes D zero; by default all."""
        return tuple(self.tensors)

    @abstractmethod
    def delta(self, numbers: Mapping[str, torch.Tensor]) -> Delta:
        """Return D from its tensors, fp32, by their letters."""

    def read(self, letter: str) -> torch.Tensor:
        """Read a tensor, fp32, on the CPU.

        Raises:
            AdapterError: a number is NaN or infinite.
        """
        return read_factor(self.tensors[letter])

    def vanishes(self) -> bool:
        """Return whether its scaling or all numbers of a factor are zero."""
        return self.scaling == 0 or any(only_zeros(self.tensors[letter]) for letter in self.factors)

    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedAdditive:
        """Read the tensors as fp32.

        Raises:
            AdapterError: a number is NaN or infinite, or the scaling exceeds fp32.
        """
        scaling = checked_scaling(self.scaling * weight, next(iter(self.tensors.values())))
        numbers = {letter: self.read(letter).to(device) for letter in self.tensors}
        return LoadedAdditive(self.delta(numbers), scaling, transposed)


@dataclass(frozen=True, slots=True)
class LoadedAdditive:
    """``scaling * D``, or its transpose, on one device."""

    delta: Delta
    scaling: float
    transposed: bool
    keeps: ClassVar[bool] = False

    @property
    def outputs(self) -> None:
        """None, because D is not known to be of low rank."""

    @property
    def inputs(self) -> None:
        """None, because D is not known to be of low rank."""

    def apply(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> bytes:
        """Add the update in PEFT's order, in fp32: D, times scaling, plus W."""
        outputs, inputs = self._place(block, rows)
        self._add(block, self.delta.part(outputs, inputs), scratch, sign=1)
        return b""

    def revert(self, block: torch.Tensor, rows: range, scratch: torch.Tensor, kept: bytes = b"") -> None:
        """Subtract the update, with the same bits on every machine."""
        outputs, inputs = self._place(block, rows)
        self._add(block, self.delta.fixed(outputs, inputs), scratch, sign=-1)

    def _place(self, block: torch.Tensor, rows: range) -> tuple[slice, slice]:
        """Return the outputs and inputs of D that are these rows of the stored matrix."""
        few, every = slice(rows.start, rows.stop), slice(0, block.shape[1])
        return (every, few) if self.transposed else (few, every)

    def _add(self, block: torch.Tensor, part: torch.Tensor, scratch: torch.Tensor, *, sign: int) -> None:
        scratch.copy_(part.T if self.transposed else part)
        if self.scaling != 1:
            scratch.mul_(self.scaling)
        block.add_(scratch, alpha=sign)
