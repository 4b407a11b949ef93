"""How parameters are stored anew: what a storage offers that dense parameters can be quantized to.

A `Making` is a storage with its options. Of a dense matrix it makes a `NewParameter`, which is known from headers alone: the
tensors that are written. Its `Quantizer` gives their bytes, stretch by stretch of the matrix's elements, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from loratool.checkpoint.dtypes import Dtype
from loratool.checkpoint.header import TensorInfo
from loratool.checkpoint.layout import NewTensor
from loratool.weights.stored import StoredWeight

if TYPE_CHECKING:
    import torch

Option = str | int | bool


class Making(Protocol):
    """A storage that parameters are quantized to, and how."""

    @property
    def storage(self) -> str:
        """The field's name for it: ``nf4``."""

    @property
    def title(self) -> str:
        """What people call it: ``NF4``."""

    @property
    def options(self) -> Mapping[str, Option]:
        """What decides the bytes of tensors, in the words of the command line and the manifest."""

    def parameter(self, name: str, shape: tuple[int, int], dtype: Dtype) -> NewParameter:
        """What becomes of a dense matrix, (out_features, in_features), of this name and dtype."""

    def quantization_config(self, compute_dtype: str, dense: Collection[str] | None) -> Mapping[str, Any]:
        """The ``quantization_config`` of a model whose linear modules are stored so.

        Args:
            compute_dtype: what a program multiplies in, as torch calls it.
            dense: the modules that stay dense; None where they are those that transformers leaves dense by itself.
        """


MakingOf = Callable[[Mapping[str, Option]], Making]
"""Gives the making with some options, by their names; the others are as usual. LoratoolError for what is none of its options."""


class NewParameter(Protocol):
    """A parameter that is to be stored anew."""

    @property
    def storage(self) -> str:
        """The field's name for its storage."""

    @property
    def tensors(self) -> tuple[NewTensor, ...]:
        """The tensors that are written; the first one holds the codes."""

    def quantizer(self) -> Quantizer:
        """What gives their bytes."""


class Quantizer(Protocol):
    """Quantizes stretches of one parameter to the nearest codes."""

    @property
    def unit(self) -> int:
        """A stretch has a multiple of so many elements, unless it is the last."""

    def measure(self, numbers: torch.Tensor) -> torch.Tensor:
        """The scales that a stretch asks for, fp32; NaN or infinity where it holds one."""

    def codes(self, numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The bytes of the codes of a stretch of finite numbers under these scales, uint8."""

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, count: int) -> torch.Tensor:
        """The `count` numbers, fp32, that the bytes of a stretch stand for under these scales."""

    def parts(self, measured: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Every other tensor, by name, for what was measured of all stretches; called on one torch thread.

        Raises:
            CheckpointError: the numbers are beyond what the storage can hold.
        """

    def scales(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The scales as they will be read from these tensors, in the order in which they were measured."""

    def image(self, parts: Mapping[str, torch.Tensor], codes: TensorInfo) -> StoredWeight:
        """The parameter with these tensors in memory; `codes` is where its codes will be."""
