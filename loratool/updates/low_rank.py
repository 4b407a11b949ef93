"""The low-rank update of LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1): W' = W + scaling * B A."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Final

from loratool.checkpoint.dtypes import DENSE, DTYPES
from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, quoted
from loratool.updates.zeros import only_zeros

if TYPE_CHECKING:
    import torch


FACTOR_DTYPES: Final = ("F64", *DENSE)
LARGEST_SCALING: Final = 3.4028234e38
LEAST_FUSED_SIDE: Final = 16
"""Smallest side of a product on which a trial shows reliably how the BLAS orders its sums."""

FIXED_ROWS: Final = 64
"""Number of rows of an fp64 product that fit in a cache."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """``scaling * B A`` with A (r, in_features) and B (out_features, r).

    `leading` limits it to that many components: the first rows of A and columns of B.
    """

    a: TensorInfo
    b: TensorInfo
    scaling: float
    leading: int | None = None
    needs_weight: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    scalable: ClassVar[bool] = True

    @property
    def rank(self) -> int:
        return self.a.shape[0] if self.leading is None else self.leading

    @property
    def kind(self) -> str:
        return f"lora r={self.rank}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {"A": self.a, "B": self.b}

    def vanishes(self) -> bool:
        """Return whether its scaling, its rank, or all used numbers of a factor are zero."""
        if self.scaling == 0 or self.rank == 0:
            return True
        return only_zeros(self.b, columns=self.leading) or only_zeros(self.a, rows=self.leading)

    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedLowRank:
        """Read A and B as fp32.

        Raises:
            AdapterError: a factor contains NaN or infinity, or the scaling exceeds fp32.
        """
        scaling = checked_scaling(self.scaling * weight, self.a)
        a, b = self.read_factors()
        return LoadedLowRank(a.to(device), b.to(device), scaling, transposed)

    def read_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the used components of A and B, fp32."""
        return read_factor(self.a)[: self.leading], read_factor(self.b)[:, : self.leading].contiguous()


@dataclass(frozen=True)
class LoadedLowRank:
    """``scaling * B A``, or its transpose, fp32, on one device: A (r, in_features), B (out_features, r)."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    transposed: bool
    keeps: ClassVar[bool] = False

    @property
    def outputs(self) -> torch.Tensor:
        """B, or ``A^T`` for the transpose."""
        return self.a.T if self.transposed else self.b

    @property
    def inputs(self) -> torch.Tensor:
        """``A^T``, or B for the transpose."""
        return self.b if self.transposed else self.a.T

    def apply(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> bytes:
        """Add the update: on a CPU in PEFT's order, in fp32 (product, times scaling, plus W); on CUDA by one addmm."""
        if block.is_cuda:
            left, right = self._factors(rows)
            block.addmm_(left, right, alpha=self.scaling)
            return b""
        exact = self.scaling >= 1 and math.frexp(self.scaling)[0] == 0.5  # times 1, 2, 4, ... rounds nothing
        if exact and not self.transposed and fused_has_the_bits(*block.shape, len(self.a), self.scaling):
            left, right = self._factors(rows)
            block.addmm_(left, right, alpha=self.scaling)
            return b""
        self.multiply(rows, scratch)
        if exact:
            block.add_(scratch, alpha=self.scaling)
        else:
            block.add_(scratch.mul_(self.scaling))
        return b""

    def revert(self, block: torch.Tensor, rows: range, scratch: torch.Tensor, kept: bytes = b"") -> None:
        """Subtract the update, with the same bits on every machine, independent of the BLAS and the block size."""
        step = len(rows) if block.is_cuda else FIXED_ROWS
        for start in range(rows.start, rows.stop, step):
            few = range(start, min(start + step, rows.stop))
            scratch[few.start - rows.start : few.stop - rows.start].copy_(self._fixed.product(few))
        block.sub_(scratch.mul_(self.scaling))

    def _factors(self, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors for the `rows` of the stored matrix: ``B A``, or ``(B A)^T = A^T B^T``."""
        if self.transposed:
            return self.a[:, rows.start : rows.stop].T, self.b.T
        return self.b[rows.start : rows.stop], self.a

    def multiply(self, rows: range, out: torch.Tensor) -> None:
        """Write the `rows` of the unscaled product to `out`, summed in PEFT's order."""
        import torch

        if self.transposed:
            # PEFT transposes the product; a BLAS may sum A^T B^T in another order.
            out.copy_((self.b @ self.a[:, rows.start : rows.stop]).T)
        else:
            torch.mm(self.b[rows.start : rows.stop], self.a, out=out)

    @cached_property
    def _fixed(self) -> FixedPointProduct:
        left, right = (self.a.T, self.b.T) if self.transposed else (self.b, self.a)
        return FixedPointProduct(left, right)


@cache
def fused_has_the_bits(rows: int, columns: int, rank: int, scaling: float) -> bool:
    """Return whether addmm on this CPU gives the bits of the separate operations (product, times a power of two, plus W).

    It does if the BLAS completes the sums of the product before it adds them to W. The rank up to which it does so depends on
    the processor (192 and 256 were seen) and the shapes, so each combination is tried once.
    """
    import torch

    if min(rows, columns) < LEAST_FUSED_SIDE:
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
    fused = torch.randn(columns, generator=generator).repeat(rows, 1)
    in_steps = (b @ a).mul_(scaling).add_(fused)
    return torch.equal(fused.addmm_(b, a, alpha=scaling), in_steps)


class FixedPointProduct:
    """``left right`` in a form that every machine computes to the same bits: left (rows, r), right (r, columns), or stacks.

    A BLAS may sum a product in any order, so its last bits depend on the machine. Here both factors are rounded to multiples
    of a power of two, one for each row of left and each column of right. The steps are coarse enough that every sum is an
    integer multiple, below 2**53, of the product of two steps, so fp64 sums are exact in any order. The relative error is
    about ``r * 2**(1 - bits)`` of the largest factors; `bits` is 24 for r = 16.
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor) -> None:
        self.bits = (52 - max(left.shape[-1] - 1, 1).bit_length()) // 2
        self._left, self._right = left, self._rounded(right, -2)

    def product(self, rows: range) -> torch.Tensor:
        """Return the `rows` of the product, fp64, (rows, columns)."""
        return self._rounded(self._left[..., rows.start : rows.stop, :], -1) @ self._right

    def _rounded(self, factor: torch.Tensor, dim: int) -> torch.Tensor:
        """Return `factor`, fp64, rounded to whole steps that are relative to its largest number along `dim`."""
        import torch

        exponent = torch.frexp(factor.abs().amax(dim, keepdim=True)).exponent.long() - self.bits
        # Build 2**exponent from its bits (IEEE 754 binary64): exp2 is not exact on every machine.
        step = ((exponent + 1023) << 52).view(torch.float64)
        return factor.double().div(step).round_().mul_(step)


def fixed_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return ``left right``, fp64, with the same bits on every machine."""
    return FixedPointProduct(left, right).product(range(left.shape[-2]))


def fixed_tucker_product(left: torch.Tensor, right: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
    """Return ``left^T core right``, fp64, with the same bits on every machine.

    left (i, out), right (j, in) and core (i, j, k...) give (out, in, k...).
    """
    rank, width, kernel = len(left), left.shape[1], core.shape[2:]
    first = fixed_product(left.T, core.reshape(rank, -1)).float()
    by_place = first.view(width, len(right), -1).transpose(1, 2).reshape(-1, len(right))
    second = fixed_product(by_place, right).view(width, -1, right.shape[1])
    return second.transpose(1, 2).reshape(width, right.shape[1], *kernel)


def checked_scaling(scaling: float, info: TensorInfo) -> float:
    """Return the factor of an update; raise AdapterError if fp32 cannot represent it. `info` is one of its tensors."""
    if abs(scaling) > LARGEST_SCALING:
        raise AdapterError(
            f"{quoted(info.name)} in {quoted(info.file)} would be multiplied by {scaling:g}, which fp32 cannot "
            "represent; correct its alpha or its weight"
        )
    return scaling


def read_factor(info: TensorInfo) -> torch.Tensor:
    """Read a tensor of an adapter file as a contiguous fp32 tensor on the CPU.

    Raises:
        AdapterError: it contains NaN or infinity, or its dtype is not a supported floating-point type.
    """
    import torch

    if info.dtype not in FACTOR_DTYPES:
        raise AdapterError(
            f"{quoted(info.name)} in {quoted(info.file)} has dtype {info.dtype}, which a factor cannot have"
        )
    factor = read_tensor(info).float()
    if not torch.isfinite(factor).all():
        raise AdapterError(
            f"{quoted(info.name)} in {quoted(info.file)} holds NaN or infinity; the training of this adapter failed"
        )
    return factor


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """Read a tensor of an adapter file, in its own dtype, on the CPU.

    Raises:
        AdapterError: the file became shorter.
    """
    import torch

    tensor = torch.empty(info.shape, dtype=DTYPES[info.dtype].as_torch())
    with open(info.file, "rb") as stream:
        stream.seek(info.start)
        buffer: Any = tensor.view(-1).view(torch.uint8).numpy()
        if stream.readinto(buffer) != info.nbytes:
            raise AdapterError(f"{quoted(info.file)} became shorter while it was read; run the command again")
    return tensor
