"""The interface of storages that dense parameters can be quantized to.

A `Making` is a storage with its options. From the header of a dense matrix it makes a `NewParameter`, which lists the tensors
to write. The parameter's `Quantizer` computes their bytes from consecutive stretches of the matrix's elements, row by row.
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
    """A storage that parameters can be quantized to, with its options."""

    @property
    def storage(self) -> str:
        """The storage's short name, such as ``nf4``."""

    @property
    def title(self) -> str:
        """The storage's name in messages, such as ``NF4``."""

    @property
    def options(self) -> Mapping[str, Option]:
        """The options that determine the bytes of tensors, by their names on the command line and in the manifest."""

    def parameter(self, name: str, shape: tuple[int, int], dtype: Dtype) -> NewParameter:
        """Return the quantized form of a dense matrix, (out_features, in_features), of this name and dtype."""

    def quantization_config(self, compute_dtype: str, dense: Collection[str] | None) -> Mapping[str, Any]:
        """Return the ``quantization_config`` of a model whose linear modules are stored this way.

        Args:
            compute_dtype: torch's name of the dtype that products are computed in.
            dense: the modules that stay dense; None if they are those that transformers keeps dense by default.
        """


MakingOf = Callable[[Mapping[str, Option]], Making]
"""Makes a `Making` with these options and defaults for the others. Raises LoratoolError for an invalid option."""


class NewParameter(Protocol):
    """A parameter that is to be stored in a new storage."""

    @property
    def storage(self) -> str:
        """The short name of the new storage."""

    @property
    def tensors(self) -> tuple[NewTensor, ...]:
        """The tensors to write. The first one holds the codes."""

    def quantizer(self) -> Quantizer:
        """Return the quantizer that computes the bytes of the tensors."""


class Quantizer(Protocol):
    """Rounds stretches of one parameter to the nearest codes."""

    @property
    def unit(self) -> int:
        """The number of elements that the size of every stretch except the last is a multiple of."""

    def measure(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the scales for a stretch, fp32. They are NaN or infinite if its numbers are."""

    def codes(self, numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the bytes of the codes, uint8, of a stretch of finite numbers under these scales."""

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, count: int) -> torch.Tensor:
        """Return the `count` numbers, fp32, of a stretch's bytes under these scales."""

    def parts(self, measured: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Return every tensor except the codes, by name, from the measured scales of all stretches.

        It is called with one torch thread.

        Raises:
            CheckpointError: the numbers are too large for the storage.
        """

    def scales(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the scales that a reader gets from these tensors, in the order in which they were measured."""

    def image(self, parts: Mapping[str, torch.Tensor], codes: TensorInfo) -> StoredWeight:
        """Return the parameter with these tensors in memory. `codes` is the tensor that will hold its codes."""
