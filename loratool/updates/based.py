"""An update of a parameter of which its adapter's file also holds the base's value: W' = update(R), whatever W was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from loratool.checkpoint.header import TensorInfo
from loratool.updates import Keeping, LoadedUpdate, Measuring, Update
from loratool.updates.replacement import LoadedReplacement
from loratool.updates.wrapper import Wrapper

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Based(Wrapper):
    """Replaces W by `tensor`, fp32, fp16 or bf16, and then applies `update`."""

    tensor: TensorInfo
    update: Update
    needs_weight: ClassVar[bool] = True
    replaces: ClassVar[bool] = False

    @property
    def kind(self) -> str:
        return f"{self.update.kind} on a copy of the base's own in its file"

    @property
    def inner(self) -> Update:
        return self.update

    def around(self, inner: Update) -> Self:
        """Return another update on the same copy."""
        return replace(self, update=inner)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {**self.update.tensors, "R": self.tensor}

    def vanishes(self) -> bool:
        """Return False: it replaces all of W."""
        return False

    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedBased:
        """Read the numbers of the update, and return a reader of R, which has the base's orientation if its shape differs."""
        turned = transposed and self.tensor.shape == self.update.shape
        update = self.update.load(transposed=transposed, weight=weight, device=device)
        return LoadedBased(LoadedReplacement(self.tensor, turned), update)


@dataclass(frozen=True, slots=True)
class LoadedBased:
    """R, read block by block, and the loaded update."""

    copy: LoadedReplacement
    update: LoadedUpdate

    @property
    def outputs(self) -> None:
        """None, because the change is not of low rank."""

    @property
    def inputs(self) -> None:
        """None, because the change is not of low rank."""

    @property
    def keeps(self) -> bool:
        return self.update.keeps

    @property
    def measures_whole(self) -> bool:
        return isinstance(self.update, Measuring) and self.update.measures_whole

    def measure(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        """Show the update the `rows` of R in the place of W."""
        if isinstance(self.update, Measuring):
            copy = block.clone()
            self.copy.apply(copy, rows, scratch)
            self.update.measure(copy, rows, scratch)

    def kept_count(self, rows: range) -> int:
        return self.update.kept_count(rows) if isinstance(self.update, Keeping) else 0

    def apply(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> bytes:
        """Put the `rows` of R into `block`, and apply the update."""
        self.copy.apply(block, rows, scratch)
        return self.update.apply(block, rows, scratch)

    def revert(self, block: torch.Tensor, rows: range, scratch: torch.Tensor, kept: bytes) -> None:
        """Revert the update, which leaves R; an undo file holds the difference from W."""
        self.update.revert(block, rows, scratch, kept)
