"""Codecs: how one weight matrix is stored, and how its rows become fp32 and go back.

A codec comes in two forms, as an update does (`loratool.updates`). The form that a plan holds is made from headers: `claim`
looks at the tensors of a checkpoint by name (no torch, no numbers) and returns a `StoredWeight` for a matrix that it knows
how to read, which says which bytes hold a block of rows. Its `load` reads what else is needed (scales) and gives the form
that decodes and encodes those bytes. A codec knows nothing of adapters. A new one is one new module here and one line in
`CODECS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, Protocol

from loratool.checkpoint.header import TensorInfo
from loratool.weights import dense, four_bit
from loratool.weights.moves import Moves
from loratool.weights.rounding import Rounding

if TYPE_CHECKING:
    import torch


class StoredWeight(Protocol):
    """One weight matrix as a checkpoint stores it."""

    @property
    def name(self) -> str:
        """The name of the matrix: that of its module, then ``.weight``."""

    @property
    def codec(self) -> str:
        """The field's name for the storage: ``bf16``, ``fp16``, ``fp32``, ``nf4``, ..."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the decoded matrix."""

    @property
    def element_bytes(self) -> int:
        """Bytes of one stored element: 1, 2 or 4."""

    @property
    def limit(self) -> float:
        """The least magnitude that the stored type rounds to infinity."""

    @property
    def lossy(self) -> bool:
        """Whether the storage is so coarse that an update is less than a step of it: then rounding is by chance, what
        survived is measured, and W' tells nothing of where in its step W was."""

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Every tensor of the checkpoint that changes with the matrix."""

    def extents(self, rows: range) -> tuple[tuple[TensorInfo, int, int], ...]:
        """The bytes that hold `rows`: a tensor, and where in its file they start and stop, for each part."""

    def load(self, device: str) -> LoadedWeight:
        """Read what decoding needs beside those bytes, onto `device`.

        Raises:
            CheckpointError: it is damaged.
        """


class LoadedWeight(Protocol):
    """A stored matrix that can be decoded and encoded. `parts` are the bytes of a block, uint8, one tensor an extent."""

    def decode(self, rows: range, parts: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        """Decode the bytes of a block into `out`, fp32, (rows, columns)."""

    def encode(
        self, rows: range, block: torch.Tensor, parts: tuple[torch.Tensor, ...], rounding: Rounding
    ) -> Moves | None:
        """Round `block`, fp32, (rows, columns), once to the stored type and put its bytes into `parts`.

        `block` is what W becomes. Of a lossy storage it is what W changes by, and `parts` hold the bytes from before; then what
        became of it is returned.
        """

    def recover(
        self,
        rows: range,
        parts: tuple[torch.Tensor, ...],
        block: torch.Tensor,
        subtract: Callable[[torch.Tensor], None],
        rounding: Rounding,
        told: bytes | None,
    ) -> None:
        """Turn the bytes in `parts`, of a block that was added to, into those from before, as far as they can be told.

        `told` is what `encode` said of it, or None where it is not known.

        `subtract` takes from fp32 numbers, (rows, columns), what was added; `block` is room for some. The bytes are the
        same on every machine: an undo file holds what they miss the true ones by.
        """

    def doubt(self, stored: tuple[torch.Tensor, ...], predicted: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """How many bits coarser than `predicted` each element of `stored` is, 0 to 3: uint8, one tensor a part.

        It tells where ``round(W' - delta)`` can miss W; `loratool.merging.residual` says how it is used.
        """


CODECS: Final[tuple[Callable[[Mapping[str, TensorInfo], str], StoredWeight | None], ...]] = (
    four_bit.claim,
    dense.claim,
)


def stored_weight(tensors: Mapping[str, TensorInfo], name: str) -> StoredWeight | None:
    """The tensor called `name` among those of a checkpoint, as a matrix, or None where no codec can read it."""
    for claim in CODECS:
        weight = claim(tensors, name)
        if weight is not None:
            return weight
    return None
