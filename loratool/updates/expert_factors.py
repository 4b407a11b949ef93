"""The low-rank updates of a stack of experts' matrices, whose factors are stacked in two matrices: PEFT's ``target_parameters``.

PEFT (``lora.ParamWrapper``) adds ``scaling * B_e A_e`` to the matrix of each expert e. The rows of A are those of A_0, A_1, ...
below each other; the columns of B are the first columns of all B_e, then the second ones, ... The product has the orientation of
the matrix, or is its transpose: versions of PEFT differ, and only the base shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from loratool.checkpoint.blocks import read_exactly
from loratool.checkpoint.dtypes import DTYPES
from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, CheckpointError, quoted
from loratool.updates import Update
from loratool.updates.low_rank import FACTOR_DTYPES, LoadedLowRank, checked_scaling
from loratool.updates.part import Divisible, Part
from loratool.updates.zeros import only_zeros

if TYPE_CHECKING:
    import torch


@runtime_checkable
class Stacked(Divisible, Protocol):
    """An update of a stack of matrices. Its shape is (experts, rows, columns), those of its own product."""

    def is_turned(self, matrix: tuple[int, ...], *, transposed: bool) -> bool | None:
        """Return whether a matrix (out_features, in_features) is the transpose of the product.

        `transposed` says whether the model holds the stack's matrices as (in_features, out_features). None if a square matrix
        leaves it open.
        """


@dataclass(frozen=True, slots=True)
class ExpertFactors:
    """``scaling * B_e A_e`` for each of `experts` matrices: A (experts * r, columns) and B (rows, r * experts).

    `turned` says for square matrices whether they are the transpose of the product, if the model holds them as
    (out_features, in_features) and if it holds the transpose; None if unknown.
    """

    a: TensorInfo
    b: TensorInfo
    scaling: float
    experts: int
    turned: tuple[bool, bool] | None = None
    needs_weight: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    scalable: ClassVar[bool] = True

    @property
    def rank(self) -> int:
        return self.a.shape[0] // self.experts

    @property
    def kind(self) -> str:
        return f"lora r={self.rank} of {self.experts} experts"

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.experts, self.b.shape[0], self.a.shape[1]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {"A": self.a, "B": self.b}

    def is_turned(self, matrix: tuple[int, ...], *, transposed: bool) -> bool | None:
        """Return whether a matrix is the transpose of the product. Shapes decide, unless it is square."""
        rows, columns = self.shape[1:]
        if rows != columns or matrix != (rows, columns):
            return matrix == (columns, rows)
        return None if self.turned is None else self.turned[transposed]

    def part(self, part: Part) -> Update:
        """Return the update of some outputs of one expert's matrix, which is the transpose of the product if `part` says so."""
        assert part.expert is not None
        return ExpertProduct(self, part.expert, part.outputs, part.transposed)

    def vanishes(self) -> bool:
        """Return whether its scaling or all numbers of a factor are zero."""
        return self.scaling == 0 or only_zeros(self.b) or only_zeros(self.a)

    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedLowRank:
        """Raise AssertionError: only parts of a stack are matrices."""
        raise AssertionError(self.kind)


@dataclass(frozen=True)
class ExpertProduct:
    """``scaling * B_e A_e`` of one expert, or its transpose if `turned`: some `outputs` of it."""

    stack: ExpertFactors
    expert: int
    outputs: slice
    turned: bool
    needs_weight: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    scalable: ClassVar[bool] = True

    @property
    def rank(self) -> int:
        return self.stack.rank

    @property
    def scaling(self) -> float:
        return self.stack.scaling

    @property
    def kind(self) -> str:
        return self.stack.kind

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.stack.shape[:0:-1] if self.turned else self.stack.shape[1:]
        return len(range(rows)[self.outputs]), columns

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.stack.tensors

    def vanishes(self) -> bool:
        """Return whether the update of the whole stack is zero."""
        return self.stack.vanishes()

    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedLowRank:
        """Read the factors of this expert as fp32.

        Raises:
            AdapterError: a factor contains NaN or infinity, or the scaling exceeds fp32.
        """
        scaling = checked_scaling(self.scaling * weight, self.stack.a)
        a, b = self._factors()
        return LoadedLowRank(a.to(device), b.to(device), scaling, transposed != self.turned)

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the factors A_e and B_e, fp32, of the product, as far as the outputs need them."""
        first, every = self.expert * self.rank, slice(None)
        rows, columns = (every, self.outputs) if self.turned else (self.outputs, every)
        a = _read(self.stack.a, slice(first, first + self.rank), columns)
        return a, _read(self.stack.b, rows, slice(self.expert, None, self.stack.experts))


def _read(info: TensorInfo, rows: slice, columns: slice) -> torch.Tensor:
    """Read a part of a matrix, contiguous fp32, on the CPU."""
    import torch

    if info.dtype not in FACTOR_DTYPES:
        raise AdapterError(
            f"{quoted(info.name)} in {quoted(info.file)} has dtype {info.dtype}, which a factor cannot have"
        )
    dtype, few = DTYPES[info.dtype], range(info.shape[0])[rows]
    first, count = few[0], few[-1] + 1 - few[0]
    row_bytes = info.nbytes // info.shape[0]
    raw = torch.empty(count * row_bytes, dtype=torch.uint8)
    content: Any = raw.numpy()
    with open(info.file, "rb") as stream:
        try:
            read_exactly(stream.fileno(), memoryview(content), info.start + first * row_bytes)
        except CheckpointError:
            raise AdapterError(f"{quoted(info.file)} became shorter while it was read; run the command again") from None
    part = raw.view(dtype.as_torch()).view(count, info.shape[1])[:: few.step, columns].float().contiguous()
    if not torch.isfinite(part).all():
        raise AdapterError(
            f"{quoted(info.name)} in {quoted(info.file)} holds NaN or infinity; the training of this adapter failed"
        )
    return part
