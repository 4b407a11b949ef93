"""The dense codec: a matrix stored as one tensor of fp32, fp16 or bf16 elements, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from loratool.checkpoint.header import TensorInfo

if TYPE_CHECKING:
    import torch

CODEC_OF: Final[Mapping[str, str]] = MappingProxyType({"F32": "fp32", "F16": "fp16", "BF16": "bf16"})
"""The field's name for each dense dtype of safetensors."""


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """A matrix of shape (rows, columns) whose elements are the bytes of `tensor`."""

    tensor: TensorInfo

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def codec(self) -> str:
        return CODEC_OF[self.tensor.dtype]

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.tensor.shape
        return rows, columns

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return (self.tensor,)

    def extents(self, rows: range) -> tuple[tuple[TensorInfo, int, int], ...]:
        row_bytes = self.tensor.nbytes // max(self.shape[0], 1)
        return ((self.tensor, self.tensor.start + rows.start * row_bytes, self.tensor.start + rows.stop * row_bytes),)

    def decode(self, parts: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        """Exact: every fp16 and bf16 number is an fp32 number."""
        out.copy_(self._elements(parts).view(out.shape))

    def encode(self, block: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> None:
        """Rounds to nearest, ties to even."""
        self._elements(parts).view(block.shape).copy_(block)

    def _elements(self, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        import torch

        (raw,) = parts
        return raw.view({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[self.tensor.dtype])


def claim(tensors: Mapping[str, TensorInfo], name: str) -> DenseWeight | None:
    """The dense matrix called `name`, or None where it is absent, no matrix, or not dense."""
    info = tensors.get(name)
    if info is None or info.dtype not in CODEC_OF or len(info.shape) != 2:
        return None
    return DenseWeight(info)
