"""One parameter as a checkpoint stores it: the form in a plan, and the form that decodes and encodes its blocks.

A stored parameter is a matrix of `rows` and `columns` that is cut into blocks of whole rows. If it is `turned`, these rows are
the columns of the parameter, because some storages keep the transpose. Blocks always have the orientation of the cut matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from loratool.checkpoint.dtypes import Dtype
from loratool.checkpoint.header import TensorInfo
from loratool.weights.code_moves import Moves
from loratool.weights.rounding import Rounding

if TYPE_CHECKING:
    import torch

Given = Literal["sum", "change"]
"""The argument of `LoadedWeight.encode`: the new W, or the change of W."""


class StoredWeight(Protocol):
    """One parameter as a checkpoint stores it, from headers alone."""

    @property
    def name(self) -> str:
        """The name of the parameter: its module's name followed by ``.weight``."""

    @property
    def storage(self) -> str:
        """The short name of the storage: ``bf16``, ``fp16``, ``fp32``, ``nf4``, ..."""

    @property
    def words(self) -> str:
        """The storage as part of a sentence: ``in bf16``, ``in 4 bits``."""

    @property
    def dtype(self) -> Dtype:
        """The dtype that it decodes to."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's own shape."""

    @property
    def rows(self) -> int:
        """Number of rows of the matrix that is cut into blocks."""

    @property
    def columns(self) -> int:
        """Number of columns of the matrix that is cut into blocks."""

    @property
    def turned(self) -> bool:
        """Whether the matrix that is cut is the transpose of the parameter."""

    @property
    def row_step(self) -> int:
        """Blocks begin and end at multiples of this number of rows."""

    @property
    def is_oriented(self) -> bool:
        """Whether the parameter is (out_features, in_features) in every module. A dense one of a Conv1D is not."""

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The tensors of the checkpoint that a merge changes."""

    @property
    def siblings(self) -> tuple[TensorInfo, ...]:
        """The parameter's other tensors, such as scales, which a merge does not change."""

    @property
    def element_bytes(self) -> int:
        """Bytes of one stored element, the unit of an undo file: 1, 2 or 4."""

    @property
    def takes(self) -> Given:
        """The kind of block that `LoadedWeight.encode` and `LoadedWeight.recover` take."""

    @property
    def limit(self) -> float:
        """The smallest magnitude that overflows the stored dtype; infinity if larger values are cut instead."""

    @property
    def block_bytes(self) -> int:
        """The approximate size of a block on a CPU, in bytes of fp32."""

    @property
    def is_computing(self) -> bool:
        """Whether a merge into it takes more time for computing than for reading and writing."""

    @property
    def undo_level(self) -> int:
        """The Zstandard level for its residuals in an undo file."""

    @property
    def keeps_hint(self) -> bool:
        """Whether `LoadedWeight.encode` returns a hint for `LoadedWeight.recover`, which an undo file keeps."""

    @property
    def is_calibrated(self) -> bool:
        """Whether its rounding can use the inputs of the matrix (`Rounding.feedback`)."""

    @property
    def is_replaceable(self) -> bool:
        """Whether the same tensors can hold entirely different numbers."""

    def by_output(self) -> StoredWeight:
        """Return the same parameter, cut so that a row holds everything of an output, also of a convolution (out, in, k...)."""

    def extents(self, rows: range) -> tuple[tuple[TensorInfo, int, int], ...]:
        """Return the bytes that hold `rows`: for each part a tensor, and the start and end of the bytes in its file.

        They may include other bytes, such as scales, which `LoadedWeight.encode` does not change.
        """

    def load(self, device: str) -> LoadedWeight:
        """Read what decoding needs besides those bytes, and put it on `device`.

        Raises:
            CheckpointError: a tensor is damaged.
        """


class LoadedWeight(Protocol):
    """A stored parameter that can be decoded and encoded.

    `parts` are the bytes of a block, uint8, one tensor per extent.
    """

    def decode(self, rows: range, parts: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        """Decode the bytes of a block into `out`, (rows, columns) fp32."""

    def encode(
        self, rows: range, block: torch.Tensor, parts: tuple[torch.Tensor, ...], rounding: Rounding
    ) -> Moves | None:
        """Round `block`, (rows, columns) fp32, once to the stored dtype and write its bytes into `parts`.

        If the storage takes the sum, `block` is the new W and the result is None. If it takes the change, `block` is the change
        of W, `parts` hold the old bytes, and the result is the moves of codes.
        """

    def recover(
        self,
        rows: range,
        block: torch.Tensor,
        parts: tuple[torch.Tensor, ...],
        rounding: Rounding,
        hint: bytes | None,
    ) -> None:
        """Undo `encode` in place as far as arithmetic can, with the same bits on every machine.

        An undo file holds the difference from the true bytes.

        Args:
            block: ``W' - delta`` if the storage takes the sum; the change that was added if it takes the change.
            hint: what `encode` returned, or None if it was not kept.
        """

    def doubt(self, stored: tuple[torch.Tensor, ...], predicted: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Return the bits by which each element of `stored` is coarser than `predicted`, 0 to 3: uint8, one tensor per part.

        ``round(W' - delta)`` can differ from W in these elements; `loratool.merging.residual` uses that.
        """
