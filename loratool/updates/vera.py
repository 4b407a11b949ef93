"""The update of VeRA (Kopiczko et al. 2023, arXiv:2310.11454, section 3.1) and of PVeRA, whose mean is merged.

D is ``diag(lambda_b) B diag(lambda_d) A``. The random A and B are shared: each module takes the first rows of B and the first
columns of A. They are in the file, or are drawn from a seed for the largest of the adapter's modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from loratool.errors import AdapterError, quoted
from loratool.updates import Places
from loratool.updates.additive import Additive, Delta
from loratool.updates.product import Product
from loratool.updates.projections import drawn
from loratool.updates.shapes import ANY

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Vera(Additive):
    """With lambda_b (out_features,), lambda_d (r,), A (r, most inputs) and B (most outputs, r). `inputs` are W's, if known."""

    inputs: int = ANY
    halves: ClassVar[int] = 1
    name: ClassVar[str] = "vera"

    @property
    def rank(self) -> int:
        return self.tensors["lambda_d"].shape[0] // self.halves

    @property
    def kind(self) -> str:
        return f"{self.name} r={self.rank}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensors["lambda_b"].shape[0], self.inputs

    def sized(self, shape: tuple[int, ...]) -> Self:
        """Return the update of a matrix of this shape; raise AdapterError if A has too few columns for it."""
        info = self.tensors.get("A")
        if info is not None and info.shape[1] < shape[1]:
            raise AdapterError(
                f"{quoted(info.name)} in {quoted(info.file)} has shape {list(info.shape)}, and a module has {shape[1]} inputs; "
                "is it the right base?"
            )
        return replace(self, inputs=shape[1])

    def projections(self, numbers: Mapping[str, torch.Tensor], *, fixed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B, fp32."""
        return numbers["A"], numbers["B"]

    def delta(self, numbers: Mapping[str, torch.Tensor]) -> Delta:
        """Return D from its tensors."""

        def factors(fixed: bool) -> tuple[torch.Tensor, torch.Tensor]:
            a, b = self.projections(numbers, fixed=fixed)
            lambda_b, lambda_d = numbers["lambda_b"], numbers["lambda_d"][: self.rank]
            right = lambda_d[:, None] * a[: self.rank, : self.inputs].to(lambda_d.device)
            return lambda_b[:, None] * b[: len(lambda_b)].to(lambda_b.device), right

        return Product(factors)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnVera(Vera):
    """A VeRA whose A and B are drawn from `seed` for all of the adapter's `places`."""

    seed: int
    places: Places | None = None

    def among(self, places: Places) -> Self:
        """Return the update of one of these parameters."""
        return replace(self, places=places)

    def projections(self, numbers: Mapping[str, torch.Tensor], *, fixed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw A and B."""
        assert self.places is not None
        return drawn(self.seed, self.rank * self.halves, self.rank, self.places, fixed=fixed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pvera(Vera):
    """The mean of a PVeRA. The second half of lambda_d (2 r,) and of A (2 r, most inputs) is a variance."""

    halves: ClassVar[int] = 2
    name: ClassVar[str] = "pvera"


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnPvera(DrawnVera):
    """The mean of a PVeRA whose A and B are drawn."""

    halves: ClassVar[int] = 2
    name: ClassVar[str] = "pvera"
