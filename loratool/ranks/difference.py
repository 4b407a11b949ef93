"""The difference of two stored matrices, streamed: only a few blocks of rows are in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loratool.checkpoint.blocks import read_exactly, row_blocks
from loratool.checkpoint.header import TensorInfo
from loratool.errors import CheckpointError, quoted
from loratool.weights.dense import DenseWeight

if TYPE_CHECKING:
    import torch

BLOCK_BYTES: Final = 1 << 25
"""Approximate bytes of fp32 in a block: enough for BLAS to multiply it by a thin factor efficiently."""


@dataclass(frozen=True, slots=True)
class Difference:
    """``D = tuned - base``, (rows, columns), for two dense matrices of one shape; each product reads both files once."""

    tuned: TensorInfo
    base: TensorInfo

    @property
    def shape(self) -> tuple[int, int]:
        return self.tuned.matrix

    def blocks(self) -> Iterator[tuple[range, torch.Tensor]]:
        """Yield blocks of rows in order, each with its values in fp32, (rows, columns).

        The values are valid until the next block is read.

        Raises:
            CheckpointError: a value is NaN or infinite, or a file cannot be read.
        """
        import torch

        rows, columns = self.shape
        with ExitStack() as stack:
            readers = [_Reader(info, stack) for info in (self.tuned, self.base)]
            for block in row_blocks(rows, columns * 4, BLOCK_BYTES):
                tuned, base = (reader.read(block) for reader in readers)
                difference = tuned.sub_(base)
                if not torch.isfinite(difference.sum(dtype=torch.float64)):
                    raise CheckpointError(
                        f"{quoted(self.tuned.name)} in {quoted(self.tuned.file)} or its base holds NaN or infinity; "
                        "the training failed, or a file is damaged"
                    )
                yield block, difference

    def energy(self) -> float:
        """The square of D's Frobenius norm, summed in fp64; 0 if the matrices are equal."""
        return sum(_energy(block) for _, block in self.blocks())

    def times(self, right: torch.Tensor) -> torch.Tensor:
        """``D right``, (rows, k), computed in the dtype of `right`, (columns, k)."""
        import torch

        return torch.cat([block.to(right.dtype) @ right for _, block in self.blocks()])

    def transposed_times(self, left: torch.Tensor) -> torch.Tensor:
        """``D^T left``, (columns, k), computed in the dtype of `left`, (rows, k)."""
        import torch

        product = torch.zeros(self.shape[1], left.shape[1], dtype=left.dtype)
        for rows, block in self.blocks():
            product.addmm_(block.to(left.dtype).T, left[rows.start : rows.stop])
        return product

    def gram(self) -> torch.Tensor:
        """``D^T D`` or ``D D^T``, whichever is smaller, fp64."""
        import torch

        rows, columns = self.shape
        if columns <= rows:
            gram = torch.zeros(columns, columns, dtype=torch.float64)
            for _, block in self.blocks():
                wide = block.double()
                gram.addmm_(wide.T, wide)
            return gram
        return torch.cat([self.times(block.double().T) for _, block in self.blocks()], dim=1)

    def residual_energy(self, b: torch.Tensor, a: torch.Tensor) -> float:
        """The square of the Frobenius norm of ``D - B A``, for B (rows, r) and A (r, columns), fp32."""
        return sum(_energy(block.sub_(b[rows.start : rows.stop] @ a)) for rows, block in self.blocks())


def _energy(block: torch.Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2


class _Reader:
    """A reader of one stored matrix, in blocks of rows, as fp32. Its file closes with `stack`."""

    def __init__(self, info: TensorInfo, stack: ExitStack) -> None:
        try:
            self._fd = os.open(info.file, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"cannot read {quoted(info.file)}: {error.strerror}") from None
        stack.callback(os.close, self._fd)
        self._weight = DenseWeight(info)

    def read(self, rows: range) -> torch.Tensor:
        import torch

        ((_, start, stop),) = self._weight.extents(rows)
        raw = torch.empty(stop - start, dtype=torch.uint8)
        content: Any = raw.numpy()
        read_exactly(self._fd, memoryview(content), start)
        block = torch.empty(len(rows), self._weight.columns)
        self._weight.decode(rows, (raw,), block)
        return block
