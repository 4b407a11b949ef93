"""The update of ``modules_to_save``: W' = R, whatever W was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, quoted
from loratool.weights.dense import DenseWeight, as_matrix

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Replacement:
    """The numbers of `tensor`, fp32, fp16 or bf16, in the place of those of W; a tensor that is no matrix is taken as one."""

    tensor: TensorInfo

    @property
    def rank(self) -> int:
        return 0

    @property
    def kind(self) -> str:
        return "replacement"

    @property
    def shape(self) -> tuple[int, int]:
        return DenseWeight(as_matrix(self.tensor)).shape

    @property
    def scaling(self) -> float:
        return 1.0

    @property
    def factors(self) -> Mapping[str, TensorInfo]:
        return {"R": self.tensor}

    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedReplacement:
        """Itself: blocks are read when they are needed. R is stored as W is, and has no weight but 1."""
        assert weight == 1
        return LoadedReplacement(self.tensor)


@dataclass(frozen=True, slots=True)
class LoadedReplacement:
    """R, read from its file block by block."""

    tensor: TensorInfo

    @property
    def outputs(self) -> None:
        """R has no low rank."""

    def apply(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        """Put the `rows` of R into `block`.

        Raises:
            AdapterError: a number is NaN or infinite.
        """
        import torch

        weight = DenseWeight(as_matrix(self.tensor))
        ((_, start, stop),) = weight.extents(rows)
        raw = torch.empty(stop - start, dtype=torch.uint8)
        with open(self.tensor.file, "rb") as stream:
            stream.seek(start)
            content: Any = raw.numpy()
            if stream.readinto(content) != stop - start:
                raise AdapterError(
                    f"{quoted(self.tensor.file)} became shorter while it was read; run the command again"
                )
        weight.decode(rows, (raw.to(block.device),), block)
        if not torch.isfinite(block).all():
            raise AdapterError(
                f"{quoted(self.tensor.name)} in {quoted(self.tensor.file)} holds NaN or infinity; "
                "the training of this adapter failed"
            )

    def revert(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        """Nothing: R tells nothing of W, so an undo file holds all of it."""
