"""The update of ``modules_to_save``: W' = R, for any W."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from loratool.checkpoint.blocks import read_columns, read_exactly
from loratool.checkpoint.dtypes import DTYPES
from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, CheckpointError, quoted

if TYPE_CHECKING:
    import torch


WHOLE: Final = "replacement"
"""The kind of a parameter that an adapter holds whole beside its updates; a method that replaces parameters has its own."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """Replaces W by `tensor`, fp32, fp16 or bf16; a tensor that is not a matrix is treated as one."""

    tensor: TensorInfo
    kind: str = WHOLE
    needs_weight: ClassVar[bool] = True
    replaces: ClassVar[bool] = True
    scalable: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {"R": self.tensor}

    def vanishes(self) -> bool:
        """Return False: it replaces all of W."""
        return False

    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedReplacement:
        """Return a reader that reads blocks when they are needed. `weight` must be 1.

        R has the orientation in its file that W has in the base. With `transposed`, blocks consist of rows of the transpose.
        """
        assert weight == 1
        return LoadedReplacement(self.tensor, transposed)


@dataclass(frozen=True, slots=True)
class LoadedReplacement:
    """R, or with `transposed` its transpose, read from its file block by block."""

    tensor: TensorInfo
    transposed: bool = False
    keeps: ClassVar[bool] = False

    @property
    def outputs(self) -> None:
        """None, because R is not of low rank."""

    @property
    def inputs(self) -> None:
        """None, because R is not of low rank."""

    def apply(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> bytes:
        """Put the `rows` of R into `block`.

        Raises:
            AdapterError: a number is NaN or infinite, or the file is too short.
        """
        import torch

        dtype = DTYPES[self.tensor.dtype]
        raw = torch.empty(block.numel() * dtype.nbytes, dtype=torch.uint8)
        content: Any = raw.numpy()
        with open(self.tensor.file, "rb") as stream:
            try:
                self._read(stream.fileno(), rows, memoryview(content))
            except CheckpointError:
                raise AdapterError(
                    f"{quoted(self.tensor.file)} became shorter while it was read; run the command again"
                ) from None
        numbers = raw.view(dtype.as_torch())
        block.copy_(numbers.view(block.shape[::-1]).T if self.transposed else numbers.view(block.shape))
        if not torch.isfinite(block).all():
            raise AdapterError(
                f"{quoted(self.tensor.name)} in {quoted(self.tensor.file)} holds NaN or infinity; "
                "the training of this adapter failed"
            )
        return b""

    def _read(self, fd: int, rows: range, content: memoryview) -> None:
        width, row_bytes = DTYPES[self.tensor.dtype].nbytes, self.tensor.nbytes // max(self.tensor.matrix[0], 1)
        if self.transposed:
            read_columns(fd, content, self.tensor.start, row_bytes, slice(rows.start * width, rows.stop * width))
        else:
            read_exactly(fd, content, self.tensor.start + rows.start * row_bytes)

    def revert(self, block: torch.Tensor, rows: range, scratch: torch.Tensor, kept: bytes = b"") -> None:
        """Do nothing: W cannot be computed from R, so an undo file holds all of W."""
