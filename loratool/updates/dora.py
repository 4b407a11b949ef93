"""The update of DoRA (Liu et al. 2024, arXiv:2402.09353, equation 5): W' = m (W + scaling * B A) / ||W + scaling * B A||.

The norm is taken over all weights of one output, and m holds one magnitude for each output. As in PEFT 0.21, it is that of the
base's own W: if other updates of W precede, the formula is ``m (W'' + scaling * B A) / ||W + scaling * B A||`` with their result
W''. An embedding has a norm and a magnitude for each of its features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from loratool.checkpoint.header import TensorInfo
from loratool.errors import RestoreError
from loratool.updates import LoadedUpdate, Ranked
from loratool.updates.low_rank import read_factor

if TYPE_CHECKING:
    import torch


class Product(Ranked, Protocol):
    """An update that adds ``scaling * B A``."""

    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedUpdate: ...


@dataclass(frozen=True, slots=True)
class Dora:
    """The low-rank update `product`, and the magnitude m of each output, (out,) or with sides of 1 beside."""

    product: Product
    m: TensorInfo

    @property
    def kind(self) -> str:
        return f"dora r={self.product.rank}"

    @property
    def rank(self) -> int:
        return self.product.rank

    @property
    def scaling(self) -> float:
        return self.product.scaling

    @property
    def shape(self) -> tuple[int, ...]:
        return self.product.shape

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {**self.product.tensors, "m": self.m}

    @property
    def needs_weight(self) -> bool:
        return True

    @property
    def replaces(self) -> bool:
        return False

    @property
    def scalable(self) -> bool:
        """True: a weight multiplies the product, and the norms are those of that sum, as by PEFT's ``scale_layer``."""
        return True

    def vanishes(self) -> bool:
        """Return False: magnitudes can change W even if the factors are zero."""
        return False

    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedDora:
        """Read the factors and m as fp32.

        Raises:
            AdapterError: a number is NaN or infinite, or the scaling exceeds fp32.
        """
        product = self.product.load(transposed=transposed, weight=weight, device=device)
        return LoadedDora(product, read_factor(self.m).flatten().to(device), transposed)


@dataclass(slots=True)
class LoadedDora:
    """The product, and m (out_features,), fp32, on one device.

    Of a transposed W, (in_features, out_features), a block holds a part of every output. The norms are then known when
    `measure` has seen all blocks, or `revert` the first one.
    """

    product: LoadedUpdate
    m: torch.Tensor
    transposed: bool = False
    keeps: ClassVar[bool] = True
    _squares: Any = field(default=None, init=False)
    _norms: torch.Tensor | None = field(default=None, init=False)

    @property
    def outputs(self) -> None:
        """None, because the change is not of low rank."""

    @property
    def inputs(self) -> None:
        """None, because the change is not of low rank."""

    @property
    def measures_whole(self) -> bool:
        return self.transposed

    def measure(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        """Find the norms of the outputs, or, of a transposed W, add the squares of a block to those before it."""
        import numpy as np
        import torch

        total = block.clone()
        self.product.apply(total, rows, scratch)
        if not self.transposed:
            self._norms = torch.linalg.vector_norm(total, dim=1)
        elif total.is_cuda:
            squares = total.square_().sum(0)
            self._squares = squares if rows.start == 0 else self._squares + squares
            self._norms = self._squares.sqrt()
        else:
            self._squares = _added(None if rows.start == 0 else self._squares, total)
            self._norms = torch.from_numpy(np.sqrt(self._squares))

    def apply(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> bytes:
        """Apply in PEFT's order, in fp32: add the product to W, then multiply by m over the norms. Return the norms."""
        import torch

        self.product.apply(block, rows, scratch)
        if self.transposed:
            assert self._norms is not None  # measure came before
            block.mul_(self.m / self._norms)
            return _bytes(self._norms) if rows.start == 0 else b""
        norms = torch.linalg.vector_norm(block, dim=1) if self._norms is None else self._norms
        self._norms = None
        block.mul_((self.m[rows.start : rows.stop] / norms)[:, None])
        return _bytes(norms)

    def kept_count(self, rows: range) -> int:
        """Return the number of norms that `apply` returns for these rows."""
        if self.transposed:
            return len(self.m) if rows.start == 0 else 0
        return len(rows)

    def revert(self, block: torch.Tensor, rows: range, scratch: torch.Tensor, kept: bytes = b"") -> None:
        """Revert the update. Without the norms that `apply` returned, assume that the norms equal the magnitudes.

        An output whose magnitude is 0 cannot be recovered.
        """
        import torch

        norms = torch.frombuffer(bytearray(kept), dtype=torch.float32).to(block.device) if kept else None
        m = self.m if self.transposed else self.m[rows.start : rows.stop]
        if norms is not None and len(norms) != len(m):
            raise RestoreError("a block of the undo file is damaged")
        if self.transposed:
            self._norms = norms = self._norms if norms is None else norms
        if norms is not None:
            back = torch.where(m == 0, m, norms / m)
            block.mul_(back if self.transposed else back[:, None])
        self.product.revert(block, rows, scratch, b"")


def _added(before: Any, block: torch.Tensor) -> Any:
    """Return the sum of the squares of each column, added row by row to the sums `before`, as torch's norm adds them: fp32."""
    import numpy as np

    squares = block.square_().numpy()
    if before is not None:
        squares = np.concatenate([before[None], squares])
    if squares.shape[1] == 1:  # numpy would add a single column in pairs
        return np.add.accumulate(squares, axis=0)[-1]
    return np.add.reduce(squares, axis=0)


def _bytes(norms: torch.Tensor) -> bytes:
    return bytes(norms.cpu().numpy().tobytes())
