"""The low-rank update of LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1): W' = W + scaling * B A."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, quoted

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class LowRank:
    """``scaling * B A`` with A (r, in_features) and B (out_features, r); rank 0 changes nothing."""

    a: TensorInfo
    b: TensorInfo
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def kind(self) -> str:
        return f"lora r={self.rank}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedLowRank:
        """Read A and B as fp32.

        Raises:
            AdapterError: a factor has a number that is NaN or infinite.
        """
        a, b = read_factor(self.a).to(device), read_factor(self.b).to(device)
        return LoadedLowRank(a, b, self.scaling * weight, transposed)


@dataclass(frozen=True)
class LoadedLowRank:
    """``scaling * B A``, or its transpose, fp32, on one device: A (r, in_features), B (out_features, r)."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    transposed: bool

    def apply(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        """On a CPU in PEFT's order, each an fp32 operation: product, times scaling, plus W. On CUDA one addmm."""
        if block.is_cuda:
            left, right = self._factors(rows)
            block.addmm_(left, right, alpha=self.scaling)
        else:
            block.add_(self._delta(rows, scratch))

    def revert(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        """Subtract the update, the same bits on every machine, whatever its BLAS and the cut into blocks."""
        scratch.copy_(self._fixed.product(rows))
        block.sub_(scratch)

    def _factors(self, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of the `rows` of the stored matrix: ``B A``, or ``(B A)^T = A^T B^T``."""
        if self.transposed:
            return self.a[:, rows.start : rows.stop].T, self.b.T
        return self.b[rows.start : rows.stop], self.a

    def _delta(self, rows: range, scratch: torch.Tensor) -> torch.Tensor:
        import torch

        if self.transposed:
            # PEFT transposes the product; a BLAS may sum A^T B^T in another order.
            scratch.copy_((self.b @ self.a[:, rows.start : rows.stop]).T)
        else:
            torch.mm(self.b[rows.start : rows.stop], self.a, out=scratch)
        return scratch.mul_(self.scaling)

    @cached_property
    def _fixed(self) -> FixedPointProduct:
        left, right = (self.a.T, self.b.T) if self.transposed else (self.b, self.a)
        return FixedPointProduct(left, right, self.scaling)


class FixedPointProduct:
    """``scaling * left right`` in a form that every machine computes to the same bits.

    A BLAS may sum a product in any order, so its last bits are a machine's own. Here both factors are rounded to
    integers, scaled by a power of two for each row of left and each column of right, so small that every sum of
    products is an integer below 2**53: in fp64 all of them are exact, in any order. The result is within about
    ``r * 2**(1 - bits)`` of the true one, relative to the largest factors; `bits` is 24 for r = 16.
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
        import torch

        rank = left.shape[1]
        self.bits = (52 - max(rank - 1, 1).bit_length()) // 2
        left, right = left.double(), right.double()
        row_steps = torch.exp2(torch.frexp(left.abs().amax(dim=1, keepdim=True)).exponent.double() - self.bits)
        column_steps = torch.exp2(torch.frexp(right.abs().amax(dim=0, keepdim=True)).exponent.double() - self.bits)
        self._left, self._right = (left / row_steps).round_(), (right / column_steps).round_()
        self._row_steps, self._column_steps = row_steps, column_steps * scaling

    def product(self, rows: range) -> torch.Tensor:
        """The `rows` of the product, fp64, (rows, columns)."""
        exact = self._left[rows.start : rows.stop] @ self._right
        return exact.mul_(self._row_steps[rows.start : rows.stop]).mul_(self._column_steps)


def read_factor(info: TensorInfo) -> torch.Tensor:
    """One tensor of an adapter file as a contiguous fp32 tensor on the CPU.

    Raises:
        AdapterError: it holds a number that is NaN or infinite, or its dtype is no floating-point type.
    """
    import torch

    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if info.dtype not in dtypes:
        raise AdapterError(f"{quoted(info.name)} in {quoted(info.file)} has dtype {info.dtype}, which is no factor's")
    with open(info.file, "rb") as stream:
        stream.seek(info.start)
        raw = bytearray(stream.read(info.nbytes))
    if len(raw) != info.nbytes:
        raise AdapterError(f"{quoted(info.file)} became shorter while it was read; run the command again")
    factor = torch.frombuffer(raw, dtype=dtypes[info.dtype]) if raw else torch.empty(0, dtype=dtypes[info.dtype])
    factor = factor.view(info.shape).float()
    if not torch.isfinite(factor).all():
        raise AdapterError(
            f"{quoted(info.name)} in {quoted(info.file)} holds NaN or infinity; the training of this adapter failed"
        )
    return factor
