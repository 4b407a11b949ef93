"""The update of Super-Tuning in PEFT 0.21: numbers at a few places of W are added and then, in "Supra", ``scaling * B A``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, quoted
from loratool.updates.low_rank import LoadedLowRank, checked_scaling, read_factor, read_tensor
from loratool.updates.relative import LoadedRelative
from loratool.updates.shapes import ANY
from loratool.updates.shira import Sparse
from loratool.updates.zeros import only_zeros

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Supertuning:
    """Adds each of n `values` at its index, counted along the rows of W, whose shape is `size`; and a product, if it has one."""

    tensors: Mapping[str, TensorInfo]
    scaling: float = 1.0
    size: tuple[int, int] = (ANY, ANY)
    needs_weight: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    scalable: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        return f"supertuning n={self.tensors['values'].shape[0]}"

    @property
    def shape(self) -> tuple[int, int]:
        if "A" in self.tensors:
            return self.tensors["B"].shape[0], self.tensors["A"].shape[1]
        return self.size

    def sized(self, shape: tuple[int, ...]) -> Self:
        """Return the update of a matrix of this shape."""
        outputs, inputs = shape
        return replace(self, size=(outputs, inputs))

    def vanishes(self) -> bool:
        """Return whether all values, and those of a factor, are zero."""
        product = [self.tensors[letter] for letter in "AB" if letter in self.tensors]
        return only_zeros(self.tensors["values"]) and (not product or any(only_zeros(info) for info in product))

    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedRelative:
        """Read the values, their places and the factors.

        Raises:
            AdapterError: a number is NaN or infinite, or an index lies outside W or is there twice.
        """
        scaling = checked_scaling(self.scaling * weight, self.tensors["values"])
        values = read_factor(self.tensors["values"]) * weight
        places = self._places()
        order = places.argsort()
        rows, columns = places[order] // self.size[1], places[order] % self.size[1]
        sparse = Sparse(rows.to(device), columns.to(device), values[order].to(device))
        product = None
        if "A" in self.tensors:
            a, b = (read_factor(self.tensors[letter]).to(device) for letter in "AB")
            product = LoadedLowRank(a, b, scaling, transposed)
        return LoadedRelative(Sums(sparse, product, transposed=transposed))

    def _places(self) -> torch.Tensor:
        import torch

        info = self.tensors["indices"]
        places = read_tensor(info).long()
        inside = bool(((places >= 0) & (places < self.size[0] * self.size[1])).all())
        if not inside or len(torch.unique(places)) != len(places):
            what = "names a place twice" if inside else f"names places outside a matrix of shape {list(self.size)}"
            raise AdapterError(f"{quoted(info.name)} in {quoted(info.file)} {what}; is it the right base?")
        return places


class Sums:
    """Numbers at a few places, and a product or None. Each is added by itself."""

    def __init__(self, sparse: Sparse, product: LoadedLowRank | None, *, transposed: bool) -> None:
        self._sparse, self._product, self._transposed = sparse, product, transposed

    def change(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        block.add_(self._few(block, rows))
        if self._product is not None:
            self._product.multiply(rows, scratch)
            block.add_(scratch.mul_(self._product.scaling))

    def restore(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        if self._product is not None:
            self._product.revert(block, rows, scratch)
        block.sub_(self._few(block, rows))

    def _few(self, block: torch.Tensor, rows: range) -> torch.Tensor:
        own, every = slice(rows.start, rows.stop), slice(0, block.shape[1])
        return self._sparse.part(every, own).T if self._transposed else self._sparse.part(own, every)
