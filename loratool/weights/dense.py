"""The dense codec: a matrix stored as one tensor of fp32, fp16 or bf16 elements, row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratool.checkpoint.dtypes import DENSE, DTYPES, Dtype
from loratool.checkpoint.header import TensorInfo

if TYPE_CHECKING:
    import torch

    from loratool.weights.rounding import Rounding


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """A matrix of shape (rows, columns) whose elements are the bytes of `tensor`."""

    tensor: TensorInfo

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def dtype(self) -> Dtype:
        """What its elements are."""
        return DTYPES[self.tensor.dtype]

    @property
    def codec(self) -> str:
        return self.dtype.title

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.tensor.shape
        return rows, columns

    @property
    def element_bytes(self) -> int:
        return self.dtype.nbytes

    @property
    def limit(self) -> float:
        return self.dtype.overflow

    @property
    def lossy(self) -> bool:
        return False

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return (self.tensor,)

    def extents(self, rows: range) -> tuple[tuple[TensorInfo, int, int], ...]:
        row_bytes = self.tensor.nbytes // max(self.shape[0], 1)
        return ((self.tensor, self.tensor.start + rows.start * row_bytes, self.tensor.start + rows.stop * row_bytes),)

    def load(self, device: str) -> DenseWeight:
        """Itself: a dense matrix needs nothing else."""
        return self

    def decode(self, rows: range, parts: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        """Exact: every fp16 and bf16 number is an fp32 number."""
        out.copy_(self._elements(parts).view(out.shape))

    def encode(self, rows: range, block: torch.Tensor, parts: tuple[torch.Tensor, ...], rounding: Rounding) -> None:
        """Rounds to nearest, ties to even."""
        self._elements(parts).view(block.shape).copy_(block)

    def recover(
        self,
        rows: range,
        parts: tuple[torch.Tensor, ...],
        block: torch.Tensor,
        subtract: Callable[[torch.Tensor], None],
        rounding: Rounding,
        told: bytes | None,
    ) -> None:
        """``round(W' - delta)``: off by a rounding here and there."""
        self.decode(rows, parts, block)
        subtract(block)
        self.encode(rows, block, parts, rounding)

    def doubt(self, stored: tuple[torch.Tensor, ...], predicted: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The difference of the exponents, where that of the stored element is larger."""
        import torch

        integer = {2: torch.int16, 4: torch.int32}[self.element_bytes]
        mask = self.dtype.exponent_mask
        lost = stored[0].view(integer) & mask
        lost.sub_(predicted[0].view(integer) & mask).bitwise_right_shift_(self.dtype.mantissa)
        return (lost.clamp_(0, 3).to(torch.uint8),)

    def _elements(self, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        (raw,) = parts
        return raw.view(self.dtype.as_torch())


def claim(tensors: Mapping[str, TensorInfo], name: str) -> DenseWeight | None:
    """The dense tensor called `name`, as a matrix, or None where it is absent or not dense."""
    info = tensors.get(name)
    return None if info is None or info.dtype not in DENSE else DenseWeight(as_matrix(info))


def as_matrix(info: TensorInfo) -> TensorInfo:
    """A tensor of any shape as the matrix whose rows are its last dimension; a vector is one row."""
    return replace(info, shape=info.matrix)
