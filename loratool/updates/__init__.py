"""Updates: what an adapter does to one weight matrix W, (out_features, in_features).

An update comes in two forms. The form that a plan holds is made from headers alone: it knows the shape of the matrix
that it fits and where its numbers lie, and `load` reads them. The loaded form changes blocks of rows of W in place, in
fp32, and takes the change out again as well as arithmetic can. Neither knows of files' names or of how W is stored.
A new kind of adapter is one new module here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from loratool.checkpoint.header import TensorInfo

if TYPE_CHECKING:
    import torch


class Update(Protocol):
    """An update before its numbers are read."""

    @property
    def kind(self) -> str:
        """The field's word for it, with its size: ``lora r=8``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter that it fits: (out_features, in_features), or any where it `replaces` the parameter."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Its tensors by the letter that the field calls them by: ``A``, ``B``, ..."""

    @property
    def needs_weight(self) -> bool:
        """Whether what it does depends on W: W' - W is not the same whatever W is."""

    @property
    def needs_outputs(self) -> bool:
        """Whether it changes a number of W by all of that output's weights, so that it needs them in one block."""

    @property
    def replaces(self) -> bool:
        """Whether W' is the same whatever W is."""

    @property
    def scalable(self) -> bool:
        """Whether it may have a weight other than 1."""

    def vanishes(self) -> bool:
        """Whether it is zero whatever W is. Reads numbers, without torch."""

    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedUpdate:
        """Read the numbers, fp32, onto `device`.

        With `transposed`, W is stored as (in_features, out_features), as GPT-2's Conv1D does, and the blocks are of
        rows of that. `weight` multiplies the whole update.

        Raises:
            AdapterError: a number is NaN or infinite.
        """


@runtime_checkable
class Ranked(Update, Protocol):
    """An update that has a rank, whatever else it has."""

    @property
    def rank(self) -> int:
        """How many components it has now; 0 changes nothing."""

    @property
    def scaling(self) -> float:
        """What multiplies the product of its factors."""


@runtime_checkable
class Factored(Ranked, Protocol):
    """An update that is ``scaling * B A`` and nothing else: what `loratool.ranks` works on."""

    def read_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Read A (r, in_features) and B (out_features, r), fp32, on the CPU.

        Raises:
            AdapterError: a number is NaN or infinite.
        """


class LoadedUpdate(Protocol):
    """An update whose numbers are in memory."""

    @property
    def outputs(self) -> torch.Tensor | None:
        """What the columns of the change are combinations of, fp32, (rows of W in blocks, r); None where it has no low rank."""

    @property
    def inputs(self) -> torch.Tensor | None:
        """What the rows of the change are combinations of, fp32, (columns of W in blocks, r); None where it has no low rank."""

    @property
    def keeps(self) -> bool:
        """Whether `apply` returns something that `revert` needs and that an undo has to keep."""

    def apply(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> bytes:
        """Change `block`, fp32, the `rows` of W, in place. `scratch` has the shape of `block` and may be overwritten.

        Returns what it `keeps`: 32-bit numbers, at most one a row.
        """

    def revert(self, block: torch.Tensor, rows: range, scratch: torch.Tensor, kept: bytes) -> None:
        """Take the change out of `block` in place, as well as fp32 arithmetic can; `kept` is what `apply` returned."""
