"""One parameter as a checkpoint stores it: what a plan knows of it, and what decodes and encodes its blocks.

A stored parameter is a matrix of `rows` and `columns` that is cut into blocks of whole rows. Those are the rows of the parameter
itself, or, where it is `turned`, its columns: some storages keep the transpose. Blocks are always given as they are cut.
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
"""What `LoadedWeight.encode` is given: what W becomes, or what is added to it."""


class StoredWeight(Protocol):
    """One parameter as a checkpoint stores it, from headers alone."""

    @property
    def name(self) -> str:
        """The name of the parameter: that of its module, then ``.weight``."""

    @property
    def storage(self) -> str:
        """The field's name for the storage: ``bf16``, ``fp16``, ``fp32``, ``nf4``, ..."""

    @property
    def words(self) -> str:
        """How it is stored, for a sentence: ``in bf16``, ``in 4 bits``."""

    @property
    def dtype(self) -> Dtype:
        """What it decodes to."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's own shape."""

    @property
    def rows(self) -> int:
        """Rows of the matrix that is cut into blocks."""

    @property
    def columns(self) -> int:
        """Columns of the matrix that is cut into blocks."""

    @property
    def turned(self) -> bool:
        """Whether the matrix that is cut is the transpose of the parameter."""

    @property
    def row_step(self) -> int:
        """The least number of rows that a block may begin and end at a multiple of."""

    @property
    def is_oriented(self) -> bool:
        """Whether the parameter is (out_features, in_features) whatever its module is; a dense Conv1D's is not."""

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The tensors of the checkpoint that a merge changes."""

    @property
    def siblings(self) -> tuple[TensorInfo, ...]:
        """The parameter's other tensors (scales, ...), which a merge leaves as they are."""

    @property
    def element_bytes(self) -> int:
        """Bytes of one stored element: 1, 2 or 4; what an undo file counts in."""

    @property
    def takes(self) -> Given:
        """What `LoadedWeight.encode` and `LoadedWeight.recover` are given."""

    @property
    def limit(self) -> float:
        """The least magnitude that the stored type cannot hold; infinity where what is too large is cut."""

    @property
    def block_bytes(self) -> int:
        """About how many bytes of fp32 a block should have on a CPU."""

    @property
    def is_computing(self) -> bool:
        """Whether a merge into it computes for longer than it reads and writes."""

    @property
    def undo_level(self) -> int:
        """The level of Zstandard that its residuals in an undo file are compressed with."""

    @property
    def keeps_hint(self) -> bool:
        """Whether `LoadedWeight.encode` gives a hint for `LoadedWeight.recover`, which an undo file keeps."""

    @property
    def is_calibrated(self) -> bool:
        """Whether its rounding can use what the matrix multiplies (`Rounding.feedback`)."""

    @property
    def is_replaceable(self) -> bool:
        """Whether other numbers can take the place of all of it in the same tensors."""

    def extents(self, rows: range) -> tuple[tuple[TensorInfo, int, int], ...]:
        """The bytes that hold `rows`: a tensor, and where in its file they start and stop, for each part.

        They may hold other bytes as well (scales), which `LoadedWeight.encode` leaves as they are.
        """

    def load(self, device: str) -> LoadedWeight:
        """Read what decoding needs beside those bytes, onto `device`.

        Raises:
            CheckpointError: it is damaged.
        """


class LoadedWeight(Protocol):
    """A stored parameter that can be decoded and encoded. `parts` are the bytes of a block, uint8, one tensor an extent."""

    def decode(self, rows: range, parts: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        """Decode the bytes of a block into `out`, fp32, (rows, columns)."""

    def encode(
        self, rows: range, block: torch.Tensor, parts: tuple[torch.Tensor, ...], rounding: Rounding
    ) -> Moves | None:
        """Round `block`, fp32, (rows, columns), once to the stored type and put its bytes into `parts`.

        `block` is what W becomes; or, where the storage takes the change, what is added to it, and `parts` hold the bytes from
        before. Then what became of it is returned.
        """

    def recover(
        self,
        rows: range,
        block: torch.Tensor,
        parts: tuple[torch.Tensor, ...],
        rounding: Rounding,
        hint: bytes | None,
    ) -> None:
        """Undo `encode` in `parts` as far as arithmetic can, with the same bits on every machine.

        `block` is what W was, as far as arithmetic tells; or, where the storage takes the change, what was added. `hint` is
        what `encode` gave, or None where it was not kept. An undo file holds what the result misses the true bytes by.
        """

    def doubt(self, stored: tuple[torch.Tensor, ...], predicted: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Bits by which each element of `stored` is coarser than `predicted`, 0 to 3: uint8, one tensor a part.

        It shows where ``round(W' - delta)`` can miss W; `loratool.merging.residual` says how it is used.
        """
