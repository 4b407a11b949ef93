"""What updates have in common whose change depends on W: products of W with numbers of the adapter.

A kind of this sort is one file: its plan form extends `Relative`, and `changer` returns its numbers as a `Changer`, which changes
blocks of rows of W in PEFT's order, and changes them back with the same bits on every machine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, quoted
from loratool.updates.low_rank import read_factor

if TYPE_CHECKING:
    import torch


class SingularError(Exception):
    """A matrix has no inverse in fp32."""


class Changer(Protocol):
    """The numbers of an update in memory. Blocks are fp32, on its device; `rows` are those of W that a block holds."""

    def change(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        """Change a block in place, in PEFT's order. `scratch` has its shape and may be overwritten."""

    def restore(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> None:
        """Change a block back in place, without sums in a BLAS's order."""


@dataclass(frozen=True, slots=True)
class Relative(ABC):
    """An update of W that depends on W, in a plan. `tensors` are those that it is made from, by the letters of the paper."""

    tensors: Mapping[str, TensorInfo]
    needs_weight: ClassVar[bool] = True
    replaces: ClassVar[bool] = False
    scalable: ClassVar[bool] = False

    @property
    @abstractmethod
    def kind(self) -> str:
        """The name of the method, with its size."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of W: (out_features, in_features)."""

    @abstractmethod
    def changer(self, numbers: Mapping[str, torch.Tensor], *, transposed: bool) -> Changer:
        """Return its tensors, fp32 and by their letters, in the form that changes blocks of W, or of its transpose.

        Raises:
            SingularError: a matrix made from them has no inverse in fp32.
            AdapterError: they cannot change W or its transpose.
        """

    def vanishes(self) -> bool:
        """Return False: most of these change W even if their numbers are all zeros."""
        return False

    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedRelative:
        """Read the tensors as fp32.

        Raises:
            AdapterError: a number is NaN or infinite, or so large that its update cannot be computed.
        """
        assert weight == 1
        numbers = {letter: read_factor(info).to(device) for letter, info in self.tensors.items()}
        try:
            return LoadedRelative(self.changer(numbers, transposed=transposed))
        except SingularError:
            info = next(iter(self.tensors.values()))
            raise AdapterError(
                f"{quoted(info.name)} in {quoted(info.file)} holds numbers so large that their rotation cannot be computed in "
                "fp32; the training of this adapter failed"
            ) from None


def refuse_transposed(update: Relative, *, transposed: bool) -> None:
    """Raise AdapterError if W is stored as (in_features, out_features) and its blocks do not hold all inputs of an output."""
    if transposed:
        tensor = next(iter(update.tensors.values()))
        raise AdapterError(
            f"{quoted(tensor.name)} in {quoted(tensor.file)} is {update.kind}, and the base stores its matrix as (in_features, "
            "out_features), for which neither PEFT nor loratool computes it; is it the right base?"
        )


@dataclass(frozen=True, slots=True)
class LoadedRelative:
    """An update of this sort on one device."""

    changer: Changer
    keeps: ClassVar[bool] = False

    @property
    def outputs(self) -> None:
        """None, because the change is not of low rank."""

    @property
    def inputs(self) -> None:
        """None, because the change is not of low rank."""

    def apply(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> bytes:
        """Change a block in PEFT's order, in fp32."""
        self.changer.change(block, rows, scratch)
        return b""

    def revert(self, block: torch.Tensor, rows: range, scratch: torch.Tensor, kept: bytes = b"") -> None:
        """Change a block back, with the same bits on every machine."""
        self.changer.restore(block, rows, scratch)
