"""The dense storage: a parameter stored as one tensor of fp32, fp16 or bf16 elements, row by row."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from loratool.checkpoint.blocks import BLOCK_BYTES
from loratool.checkpoint.dtypes import DENSE, DTYPES, Dtype
from loratool.checkpoint.header import TensorInfo
from loratool.weights.storage import Model, Storage
from loratool.weights.stored import Given

if TYPE_CHECKING:
    import torch

    from loratool.weights.rounding import Rounding


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """A parameter of any shape whose elements are the bytes of `tensor`.

    Its last dimension is a row of the matrix to cut. If `whole_outputs`, all of its dimensions but the first are.
    """

    tensor: TensorInfo
    whole_outputs: bool = False

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def storage(self) -> str:
        return self.dtype.title

    @property
    def words(self) -> str:
        return f"in {self.dtype.title}"

    @property
    def dtype(self) -> Dtype:
        return DTYPES[self.tensor.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def rows(self) -> int:
        return self.shape[0] if self.whole_outputs else self.tensor.matrix[0]

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:]) if self.whole_outputs else self.tensor.matrix[1]

    @property
    def turned(self) -> bool:
        return False

    @property
    def row_step(self) -> int:
        return 1

    @property
    def is_oriented(self) -> bool:
        return False

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return (self.tensor,)

    @property
    def siblings(self) -> tuple[TensorInfo, ...]:
        return ()

    @property
    def element_bytes(self) -> int:
        return self.dtype.nbytes

    @property
    def takes(self) -> Given:
        return "sum"

    @property
    def limit(self) -> float:
        return self.dtype.overflow

    @property
    def block_bytes(self) -> int:
        return BLOCK_BYTES

    @property
    def is_computing(self) -> bool:
        return False

    @property
    def undo_level(self) -> int:
        return 3

    @property
    def keeps_hint(self) -> bool:
        return False

    @property
    def is_calibrated(self) -> bool:
        return False

    @property
    def is_replaceable(self) -> bool:
        return True

    def by_output(self) -> DenseWeight:
        return replace(self, whole_outputs=True) if len(self.shape) > 2 else self

    def extents(self, rows: range) -> tuple[tuple[TensorInfo, int, int], ...]:
        row_bytes = self.tensor.nbytes // max(self.rows, 1)
        return ((self.tensor, self.tensor.start + rows.start * row_bytes, self.tensor.start + rows.stop * row_bytes),)

    def load(self, device: str) -> DenseWeight:
        """Return itself: a dense parameter needs no other tensors."""
        return self

    def decode(self, rows: range, parts: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        """Decode exactly: every fp16 and bf16 number is an fp32 number."""
        out.copy_(self._elements(parts).view(out.shape))

    def encode(self, rows: range, block: torch.Tensor, parts: tuple[torch.Tensor, ...], rounding: Rounding) -> None:
        """Round to nearest, ties to even."""
        self._elements(parts).view(block.shape).copy_(block)

    def recover(self, rows: range, block: torch.Tensor, parts: tuple[torch.Tensor, ...], rounding: Rounding,
                hint: bytes | None) -> None:  # fmt: skip
        """Store ``round(W' - delta)``, which differs from W in the last bit of some elements."""
        self.encode(rows, block, parts, rounding)

    def doubt(self, stored: tuple[torch.Tensor, ...], predicted: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Return the difference of the exponents if that of the stored element is larger, otherwise 0."""
        import torch

        integer = {2: torch.int16, 4: torch.int32}[self.element_bytes]
        mask = self.dtype.exponent_mask
        lost = stored[0].view(integer) & mask
        lost.sub_(predicted[0].view(integer) & mask).bitwise_right_shift_(self.dtype.mantissa)
        return (lost.clamp_(0, 3).to(torch.uint8),)

    def _elements(self, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        (raw,) = parts
        return raw.view(self.dtype.as_torch())


def claim(model: Model, name: str) -> DenseWeight | None:
    """Return the dense tensor called `name`, or None if it is absent or not dense."""
    info = model.tensors.get(name)
    return None if info is None or info.dtype not in DENSE else DenseWeight(info)


STORAGE: Final = Storage(
    names=tuple(DTYPES[name].title for name in DENSE),
    title="fp32, fp16 and bf16",
    claim=claim,
    parameter_of=lambda tensor: tensor,
    describes=lambda config: None,
)
