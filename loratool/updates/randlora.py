"""The update of RandLoRA (Albert et al. 2025, arXiv:2502.00987): a sum of random products, each scaled by trained diagonals.

The random A (r, 1, least side) and B (greatest side, n, r) are shared: each module takes the first numbers of each. D is
``B diag(lambda) A diag(gamma)``, summed over all n products of rank r, or its transpose if W has more inputs than outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Self

from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, quoted
from loratool.updates.additive import Additive, Delta
from loratool.updates.low_rank import fixed_product
from loratool.updates.shapes import ANY

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class RandLora(Additive):
    """With lambda (r, n), gamma (n, least side), A and B. `size` is the shape of W, if known."""

    size: tuple[int, int] = (ANY, ANY)
    undivided: ClassVar[bool] = True

    @property
    def rank(self) -> int:
        return self.tensors["lambda"].shape[0]

    @property
    def kind(self) -> str:
        return f"randlora r={self.rank}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    def sized(self, shape: tuple[int, ...]) -> Self:
        """Return the update of a matrix of this shape; raise AdapterError if its tensors do not fit it."""
        least, greatest = min(shape), max(shape)
        gamma, b = self.tensors["gamma"], self.tensors["B"]
        if gamma.shape != (-(-least // self.rank), least):
            raise _unfit(gamma, shape)
        if b.shape[0] < greatest:
            raise _unfit(b, shape)
        return replace(self, size=(shape[0], shape[1]))

    def delta(self, numbers: Mapping[str, torch.Tensor]) -> Delta:
        """Return D from its tensors."""
        count, least = numbers["gamma"].shape
        small = numbers["lambda"][:, :, None] * numbers["A"][:, :, :least] * numbers["gamma"]
        large = numbers["B"][: max(self.size), :count]
        return RandomProducts(small.flatten(0, 1), large.flatten(1), turned=self.size[0] < self.size[1])


@dataclass(frozen=True)
class RandomProducts:
    """``large small``, or its transpose: large (greatest side, n r), small (n r, least side), fp32.

    PEFT multiplies all of it, and the BLAS may sum a part in another order.
    """

    small: torch.Tensor
    large: torch.Tensor
    turned: bool

    def part(self, outputs: slice, inputs: slice) -> torch.Tensor:
        return self._whole[outputs, inputs]

    def fixed(self, outputs: slice, inputs: slice) -> torch.Tensor:
        left, right = (self.small.T, self.large.T) if self.turned else (self.large, self.small)
        return fixed_product(left[outputs], right[:, inputs])

    @cached_property
    def _whole(self) -> torch.Tensor:
        return (self.large @ self.small).T if self.turned else (self.small.T @ self.large.T).T


def _unfit(info: TensorInfo, shape: tuple[int, ...]) -> AdapterError:
    return AdapterError(
        f"{quoted(info.name)} in {quoted(info.file)} has shape {list(info.shape)}, which does not fit a matrix of shape "
        f"{list(shape)}; is it the right base?"
    )
