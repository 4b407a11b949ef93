"""The update of BD-LoRA (PEFT 0.21, ``BdLoraConfig``): a LoRA one of whose factors is block-diagonal, so that it can be sharded.

The file keeps only the blocks, one under the other: of A (r, in_features / n), or of B (out_features, r / n).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratool.checkpoint.header import TensorInfo
from loratool.updates.low_rank import LoadedLowRank, checked_scaling, read_factor
from loratool.updates.zeros import only_zeros

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class BlockDiagonal:
    """``scaling * B A``, where `a` and `b` keep so many blocks of A and B; a factor that is not divided has one."""

    a: TensorInfo
    b: TensorInfo
    scaling: float
    blocks_of_a: int = 1
    blocks_of_b: int = 1
    needs_weight: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    scalable: ClassVar[bool] = True

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def kind(self) -> str:
        return f"bdlora r={self.rank}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1] * self.blocks_of_a

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {"A": self.a, "B": self.b}

    def vanishes(self) -> bool:
        """Return whether its scaling or all numbers of a factor are zero."""
        return self.scaling == 0 or only_zeros(self.b) or only_zeros(self.a)

    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedLowRank:
        """Read A and B as fp32, whole.

        Raises:
            AdapterError: a factor contains NaN or infinity, or the scaling exceeds fp32.
        """
        scaling = checked_scaling(self.scaling * weight, self.a)
        a, b = _whole(read_factor(self.a), self.blocks_of_a), _whole(read_factor(self.b), self.blocks_of_b)
        return LoadedLowRank(a.to(device), b.to(device), scaling, transposed)


def _whole(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """Return the matrix with these blocks, one under the other, on its diagonal."""
    import torch

    if count == 1:
        return blocks
    whole: torch.Tensor = torch.block_diag(*blocks.chunk(count))  # type: ignore[no-untyped-call]
    return whole
