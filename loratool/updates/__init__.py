"""Updates: what an adapter does to one weight matrix W, (out_features, in_features).

An update comes in two forms. The form in a plan is made from headers alone: it knows the shape of its matrix and where its
numbers are, and `load` reads them. The loaded form changes blocks of rows of W in place, in fp32, and reverts the change as
exactly as arithmetic can. Neither knows file names or how W is stored.

A new kind of adapter is one new module here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from loratool.checkpoint.dtypes import Dtype
from loratool.checkpoint.header import TensorInfo

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Places:
    """The parameters that an adapter changes: the most outputs and inputs that one has, and the dtypes that they decode to."""

    outputs: int
    inputs: int
    dtypes: frozenset[Dtype]


class Update(Protocol):
    """An update before its numbers are read."""

    @property
    def kind(self) -> str:
        """The name of the method, with its size: ``lora r=8``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part of a parameter that it changes: (out, in), (out, in, k...) of a convolution, (n,) of a bias.

        It is any shape if the update `replaces` the parameter. A dimension that the adapter does not tell is `shapes.ANY`.
        """

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Its tensors by their usual letters: ``A``, ``B``, ..."""

    @property
    def needs_weight(self) -> bool:
        """Whether W' - W depends on W."""

    @property
    def replaces(self) -> bool:
        """Whether W' does not depend on W."""

    @property
    def scalable(self) -> bool:
        """Whether it supports a weight other than 1."""

    def vanishes(self) -> bool:
        """Return whether it is zero for every W. Reads numbers, without torch."""

    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedUpdate:
        """Read the numbers, fp32, onto `device`.

        With `transposed`, W is stored as (in_features, out_features), like GPT-2's Conv1D, and blocks consist of rows of that
        matrix. `weight` multiplies the whole update.

        Raises:
            AdapterError: a number is NaN or infinite.
        """


@runtime_checkable
class RowsUpdate(Update, Protocol):
    """An update of some rows of a matrix that may have more: `shape` has only the rows up to the last of them."""

    @property
    def indices(self) -> tuple[int, ...]:
        """The rows that it changes, each once."""


@runtime_checkable
class SizedUpdate(Update, Protocol):
    """An update that must know the whole shape of its parameter, which its adapter does not tell."""

    def sized(self, shape: tuple[int, ...]) -> Update:
        """Return the update of a parameter of this shape.

        Raises:
            AdapterError: it fits no parameter of this shape.
        """


@runtime_checkable
class DrawnUpdate(Update, Protocol):
    """An update from numbers that are drawn from a seed for all parameters that its adapter changes."""

    def among(self, places: Places) -> Update:
        """Return the update of one of these parameters."""


@runtime_checkable
class BiasUpdate(Update, Protocol):
    """An update of the bias of a module whose weight is updated as well."""

    @property
    def only_if_present(self) -> bool:
        """Whether a module that has no bias in the base lacks nothing."""


@runtime_checkable
class OutputwiseUpdate(Update, Protocol):
    """An update that may need all inputs of an output at once."""

    @property
    def needs_outputs(self) -> bool:
        """Whether each block must hold all weights of its outputs, so that W cannot be stored as (in_features, out_features)."""


@runtime_checkable
class UndividedUpdate(Update, Protocol):
    """An update that may have no parts."""

    @property
    def undivided(self) -> bool:
        """Whether an output of W' depends on other outputs of W, or on which outputs of how many there are."""


@runtime_checkable
class Ranked(Update, Protocol):
    """An update that has a rank."""

    @property
    def rank(self) -> int:
        """The current number of components; with 0 it changes nothing."""

    @property
    def scaling(self) -> float:
        """The factor that multiplies the product of its matrices."""


@runtime_checkable
class Factored(Ranked, Protocol):
    """An update that is exactly ``scaling * B A``, as `loratool.ranks` requires."""

    def read_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Read A (r, in_features) and B (out_features, r), fp32, on the CPU.

        Raises:
            AdapterError: a number is NaN or infinite.
        """


class LoadedUpdate(Protocol):
    """An update whose numbers are in memory."""

    @property
    def outputs(self) -> torch.Tensor | None:
        """Basis of the columns of the change, fp32, (rows of W as stored, r); None if the change is not of low rank."""

    @property
    def inputs(self) -> torch.Tensor | None:
        """Basis of the rows of the change, fp32, (columns of W as stored, r); None if the change is not of low rank."""

    @property
    def keeps(self) -> bool:
        """Whether `apply` returns data that `revert` needs and that an undo must keep."""

    def apply(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> bytes:
        """Change `block`, fp32, the `rows` of W, in place. `scratch` has the shape of `block` and may be overwritten.

        A convolution's W has a row for each output, and a bias is one row. Returns what it `keeps`: 32-bit numbers.
        """

    def revert(self, block: torch.Tensor, rows: range, scratch: torch.Tensor, kept: bytes) -> None:
        """Revert the change of `block` in place, as exactly as fp32 arithmetic can; `kept` is what `apply` returned.

        Raises:
            RestoreError: `kept` is damaged.
        """


@runtime_checkable
class Measuring(LoadedUpdate, Protocol):
    """A loaded update that depends on W as it was before any update."""

    @property
    def measures_whole(self) -> bool:
        """Whether `measure` must see all blocks, in order, before the first `apply`.

        If not, the block to `apply` is enough, and `measure` sees it only if another update comes before.
        """

    def measure(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        """Note what `apply` needs of `block`, fp32, the `rows` of W before any update. `scratch` may be overwritten."""


@runtime_checkable
class Keeping(LoadedUpdate, Protocol):
    """A loaded update that keeps something for its undo."""

    def kept_count(self, rows: range) -> int:
        """Return the number of 32-bit numbers that `apply` returns for these rows."""
