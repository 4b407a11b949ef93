"""The update of SHiRA (Bhardwaj et al. 2024, arXiv:2406.13175): numbers at a few places of W are added, the rest stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, quoted
from loratool.updates.additive import Additive, Delta
from loratool.updates.low_rank import read_factor, read_tensor
from loratool.updates.shapes import ANY

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Shira(Additive):
    """Adds each of the n values at its index, (2, n): output and input. `size` is the shape of W, if known."""

    size: tuple[int, int] = (ANY, ANY)
    undivided: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        return f"shira n={self.tensors['values'].shape[0]}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @property
    def factors(self) -> tuple[str, ...]:
        return ("values",)

    def sized(self, shape: tuple[int, ...]) -> Self:
        """Return the update of a matrix of this shape."""
        outputs, inputs = shape
        return replace(self, size=(outputs, inputs))

    def read(self, letter: str) -> torch.Tensor:
        """Read the values as fp32, or the indices as whole numbers.

        Raises:
            AdapterError: a value is NaN or infinite, an index lies outside W, or two are the same.
        """
        info = self.tensors[letter]
        if letter in self.factors:
            return read_factor(info)
        indices = read_tensor(info)
        whole = indices.long()
        if not (whole == indices).all():
            raise _wrong(info, "holds indices that are no whole numbers; save it again")
        if bool(((whole < 0) | (whole >= whole.new_tensor(self.size)[:, None])).any()):
            raise _wrong(info, f"names places outside a matrix of shape {list(self.size)}; is it the right base?")
        places = (whole[0] * self.size[1] + whole[1]).sort().values
        if bool((places[1:] == places[:-1]).any()):
            raise _wrong(info, "names a place twice; save it again")
        return whole

    def delta(self, numbers: Mapping[str, torch.Tensor]) -> Delta:
        """Return D from the values and their indices."""
        order = numbers["indices"][0].argsort(stable=True)
        rows, columns = numbers["indices"][:, order]
        return Sparse(rows.contiguous(), columns, numbers["values"][order])


@dataclass(frozen=True, slots=True)
class Sparse:
    """Values at rows and columns, in the order of the rows. All other numbers are -0.0, which adds nothing, not even to -0.0."""

    rows: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor

    def part(self, outputs: slice, inputs: slice) -> torch.Tensor:
        import torch

        bounds = torch.searchsorted(self.rows, self.rows.new_tensor([outputs.start, outputs.stop]))
        few = slice(int(bounds[0]), int(bounds[1]))
        rows, columns = self.rows[few] - outputs.start, self.columns[few] - inputs.start
        inside = (columns >= 0) & (columns < inputs.stop - inputs.start)
        found = self.values.new_full((outputs.stop - outputs.start, inputs.stop - inputs.start), -0.0)
        found[rows[inside], columns[inside]] = self.values[few][inside]
        return found

    def fixed(self, outputs: slice, inputs: slice) -> torch.Tensor:
        return self.part(outputs, inputs)


def _wrong(info: TensorInfo, what: str) -> AdapterError:
    return AdapterError(f"{quoted(info.name)} in {quoted(info.file)} {what}")
