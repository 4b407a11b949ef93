"""The update of a parameter that is a vector, such as a bias: b' = b + scaling * v."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from loratool.checkpoint.header import TensorInfo
from loratool.updates.low_rank import checked_scaling, read_factor
from loratool.updates.part import Part
from loratool.updates.zeros import only_zeros

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Vector:
    """Adds ``scaling * v``, or some `elements` of it; `kind` is its method's name.

    `v` may have more dimensions than one, if all but one are 1.
    """

    kind: str
    v: TensorInfo
    scaling: float = 1.0
    elements: slice = field(default_factory=lambda: slice(None))
    needs_weight: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    scalable: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(range(math.prod(self.v.shape))[self.elements]),)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {"v": self.v}

    def part(self, part: Part) -> Vector:
        """Return the update of some elements."""
        return replace(self, elements=part.outputs)

    def vanishes(self) -> bool:
        """Return whether its scaling or all numbers of v are zero."""
        return self.scaling == 0 or only_zeros(self.v)

    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedVector:
        """Read v as fp32. A vector has no transpose.

        Raises:
            AdapterError: a number is NaN or infinite, or the scaling exceeds fp32.
        """
        scaling = checked_scaling(self.scaling * weight, self.v)
        return LoadedVector(read_factor(self.v).flatten()[self.elements].to(device) * scaling)


@dataclass(frozen=True, slots=True)
class LoadedVector:
    """``scaling * v``, fp32, on one device. The stored vector is one row."""

    added: torch.Tensor
    keeps: ClassVar[bool] = False

    @property
    def outputs(self) -> None:
        """None, because a vector has no factors."""

    @property
    def inputs(self) -> None:
        """None, because a vector has no factors."""

    def apply(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> bytes:
        """Add the update in PEFT's order, in fp32: v times scaling, plus b."""
        if len(rows):
            block.add_(self.added)
        return b""

    def revert(self, block: torch.Tensor, rows: range, scratch: torch.Tensor, kept: bytes = b"") -> None:
        """Subtract the update, with the same bits on every machine."""
        if len(rows):
            block.sub_(self.added)
