"""The update of BOFT (Liu et al. 2024, arXiv:2311.06243) with one butterfly factor: a rotation of blocks of inputs, and factors.

PEFT computes Q as half of ``R - R^T``. OFT (arXiv:2306.07280) was the same in PEFT 0.14 and 0.15.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratool.checkpoint.header import TensorInfo
from loratool.updates.relative import Relative, refuse_transposed
from loratool.updates.rotation import Rotation, cayley, cayley_inverse
from loratool.updates.shapes import ANY

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Boft(Relative):
    """Rotates blocks of n inputs by R, (..., blocks, n, n), and multiplies each output by s, (out_features, 1).

    With `shares`, R has one block for all inputs. `method` is the kind's word.
    """

    method: str
    shares: bool = False
    needs_outputs: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        return f"{self.method} n={self._r.shape[-1]}"

    @property
    def shape(self) -> tuple[int, ...]:
        *_, blocks, n, _ = self._r.shape
        return self.tensors["s"].shape[0], ANY if self.shares else blocks * n

    @property
    def _r(self) -> TensorInfo:
        return self.tensors["R"]

    def changer(self, numbers: Mapping[str, torch.Tensor], *, transposed: bool) -> Rotation:
        """Return the rotation and the factors."""
        refuse_transposed(self, transposed=transposed)
        n = self._r.shape[-1]
        r = numbers["R"].view(-1, n, n)
        q = 0.5 * (r - r.transpose(1, 2))
        return Rotation(cayley(q), lambda: cayley_inverse(q), numbers["s"], shares=self.shares)
