"""The update of a part of a parameter: some of the outputs of its matrix, or one matrix of a stack.

An update of one matrix need not know of its parts. It sees the rows that belong to the part among others that do not count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

from loratool.updates import Keeping, LoadedUpdate, Measuring, UndividedUpdate, Update
from loratool.updates.shapes import ANY
from loratool.updates.wrapper import Wrapper

if TYPE_CHECKING:
    import torch


class Part(Protocol):
    """The part of an update's own parameter, such as an `architecture.View`."""

    @property
    def expert(self) -> int | None:
        """The index of the matrix in a stack, or None if the parameter is not a stack."""

    @property
    def outputs(self) -> slice:
        """The outputs of the matrix."""

    @property
    def transposed(self) -> bool:
        """Whether the matrix is the transpose of the update's own."""


@runtime_checkable
class Divisible(Update, Protocol):
    """An update that makes the updates of its parts itself, such as that of a stack of matrices."""

    def part(self, part: Part) -> Update:
        """Return the update of a part of its parameter."""


def part_of(update: Update, part: Part) -> Update:
    """Return the update of a part of the parameter that `update` changes, which must be divisible."""
    if isinstance(update, Divisible):
        return update.part(part)
    assert part.expert is None
    assert not part.transposed
    assert is_divisible(update)
    if part.outputs == slice(None) or update.shape[0] == ANY:  # it does the same to all outputs
        return update
    return SomeOutputs(update, part.outputs)


def is_divisible(update: Update) -> bool:
    """Return whether an update has parts."""
    return not (isinstance(update, UndividedUpdate) and update.undivided)


@dataclass(frozen=True)
class SomeOutputs(Wrapper):
    """An update of some `outputs` of a matrix that `whole` changes. `whole` must be divisible."""

    whole: Update
    outputs: slice

    @property
    def inner(self) -> Update:
        return self.whole

    def around(self, inner: Update) -> Self:
        """Return the same outputs of another update."""
        return replace(self, whole=inner)

    @property
    def shape(self) -> tuple[int, ...]:
        rows, *others = self.whole.shape
        return len(range(rows)[self.outputs]), *others

    def inner_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the whole matrix."""
        return self.whole.shape[0], *shape[1:]

    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedOutputs:
        """Read the numbers of the whole update."""
        loaded = self.whole.load(transposed=transposed, weight=weight, device=device)
        return LoadedOutputs(loaded, range(self.whole.shape[0])[self.outputs], self.whole.shape[0], transposed)


@dataclass(frozen=True)
class LoadedOutputs:
    """A loaded update of `count` outputs of which only `own` are in the blocks. With `transposed`, these are columns."""

    whole: LoadedUpdate
    own: range
    count: int
    transposed: bool

    @property
    def keeps(self) -> bool:
        return self.whole.keeps

    @property
    def outputs(self) -> torch.Tensor | None:
        basis = self.whole.outputs
        return basis if basis is None or self.transposed else basis[self._slice]

    @property
    def inputs(self) -> torch.Tensor | None:
        basis = self.whole.inputs
        return basis[self._slice] if basis is not None and self.transposed else basis

    @property
    def _slice(self) -> slice:
        return slice(self.own.start, self.own[-1] + 1, self.own.step)

    @property
    def measures_whole(self) -> bool:
        return isinstance(self.whole, Measuring) and self.whole.measures_whole

    def measure(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        if not isinstance(self.whole, Measuring):
            return
        if self._is_run:
            self.whole.measure(block, self._rows(rows), scratch)
        else:
            around, _ = self._around(block, rows)
            self.whole.measure(around, self._rows(rows), around.new_empty(around.shape))

    def kept_count(self, rows: range) -> int:
        return self.whole.kept_count(self._rows(rows)) if isinstance(self.whole, Keeping) else 0

    def apply(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> bytes:
        if self._is_run:
            return self.whole.apply(block, self._rows(rows), scratch)
        around, own = self._around(block, rows)
        kept = self.whole.apply(around, self._rows(rows), around.new_empty(around.shape))
        block.copy_(own)
        return kept

    def revert(self, block: torch.Tensor, rows: range, scratch: torch.Tensor, kept: bytes) -> None:
        if self._is_run:
            self.whole.revert(block, self._rows(rows), scratch, kept)
            return
        around, own = self._around(block, rows)
        self.whole.revert(around, self._rows(rows), around.new_empty(around.shape), kept)
        block.copy_(own)

    @property
    def _is_run(self) -> bool:
        """Whether the rows of a block are consecutive rows of the whole matrix."""
        return not self.transposed and self.own.step == 1

    def _rows(self, rows: range) -> range:
        """Return the rows of the whole matrix, as it is stored, from the first to the last row of a block."""
        if self.transposed:
            return rows
        mine = self.own[rows.start : rows.stop]
        return range(mine.start, mine[-1] + 1)

    def _around(self, block: torch.Tensor, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a block of the whole matrix, with zeros for what is not in `block`, and the part of it that is."""
        if self.transposed:
            around = block.new_zeros(len(block), self.count)
            own = around[:, self._slice]
        else:
            around = block.new_zeros(len(self._rows(rows)), block.shape[1])
            own = around[:: self.own.step]
        own.copy_(block)
        return around, own
