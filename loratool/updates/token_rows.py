"""The update of trainable tokens: some rows of an embedding become others, whatever they were."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import TYPE_CHECKING, ClassVar, Final

from loratool.checkpoint.header import TensorInfo
from loratool.updates.low_rank import read_factor

if TYPE_CHECKING:
    import torch

KIND: Final = "token rows"


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Replaces the rows `indices` of W, (tokens, width), by those of `rows`, (len(indices), width).

    `kind` is its method's name.
    """

    rows: TensorInfo
    indices: tuple[int, ...]
    kind: str = KIND
    needs_weight: ClassVar[bool] = True
    replaces: ClassVar[bool] = False
    scalable: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, int]:
        return max(self.indices) + 1, self.rows.shape[1]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {"T": self.rows}

    def vanishes(self) -> bool:
        """Return False: it replaces whatever the rows were."""
        return False

    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedTokenRows:
        """Read the rows as fp32.

        Raises:
            AdapterError: a number is NaN or infinite.
        """
        assert weight == 1
        return LoadedTokenRows(read_factor(self.rows).to(device), self.indices, transposed)


@dataclass(frozen=True)
class LoadedTokenRows:
    """The new rows of W, or columns if it is stored transposed, fp32, on one device."""

    rows: torch.Tensor
    indices: tuple[int, ...]
    transposed: bool
    keeps: ClassVar[bool] = False

    @property
    def outputs(self) -> None:
        """None, because the change is not of low rank."""

    @property
    def inputs(self) -> None:
        """None, because the change is not of low rank."""

    def apply(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> bytes:
        """Put the new rows into `block`."""
        if self.transposed:
            block[:, list(self.indices)] = self.rows.T[rows.start : rows.stop]
            return b""
        first, last = (bisect_left(self._in_order, row, key=itemgetter(0)) for row in (rows.start, rows.stop))
        if first < last:
            old, new = zip(*self._in_order[first:last], strict=True)
            block[[row - rows.start for row in old]] = self.rows[list(new)]
        return b""

    @cached_property
    def _in_order(self) -> list[tuple[int, int]]:
        """Each row of W that changes, in order, with its place among the new rows."""
        return sorted((row, place) for place, row in enumerate(self.indices))

    def revert(self, block: torch.Tensor, rows: range, scratch: torch.Tensor, kept: bytes = b"") -> None:
        """Do nothing: the old rows cannot be computed from the new ones, so an undo file holds them."""
