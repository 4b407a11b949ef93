"""Updates that are made of another update, such as that of a part of its parameter. They have all of its traits.

What an update tells of itself is asked through every update around it: each trait is passed on here, once for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

from loratool.checkpoint.header import TensorInfo
from loratool.updates import DrawnUpdate, OutputwiseUpdate, Places, UndividedUpdate, Update
from loratool.updates.shapes import sized

if TYPE_CHECKING:
    from loratool.updates import LoadedUpdate


class Wrapper(ABC):
    """An update around an `inner` one, which has its traits where it does not define them itself."""

    @property
    @abstractmethod
    def inner(self) -> Update:
        """The update that this one is made of."""

    @abstractmethod
    def around(self, inner: Update) -> Self:
        """Return the same around another update."""

    @abstractmethod
    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedUpdate:
        """Read its numbers, as `Update.load` does."""

    @property
    def kind(self) -> str:
        return self.inner.kind

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.inner.tensors

    @property
    def needs_weight(self) -> bool:
        return self.inner.needs_weight

    @property
    def replaces(self) -> bool:
        return self.inner.replaces

    @property
    def scalable(self) -> bool:
        return self.inner.scalable

    @property
    def needs_outputs(self) -> bool:
        return isinstance(self.inner, OutputwiseUpdate) and self.inner.needs_outputs

    @property
    def undivided(self) -> bool:
        return isinstance(self.inner, UndividedUpdate) and self.inner.undivided

    def vanishes(self) -> bool:
        """Return whether the inner update is zero."""
        return self.inner.vanishes()

    def inner_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the inner update's parameter, if this one's has `shape`."""
        return shape

    def sized(self, shape: tuple[int, ...]) -> Self:
        """Return it for a parameter of this shape."""
        return self.around(sized(self.inner, self.inner_shape(shape)))

    def among(self, places: Places) -> Self:
        """Return it with an inner update that was told the parameters that its adapter changes, if it is drawn for these."""
        return self.around(self.inner.among(places)) if isinstance(self.inner, DrawnUpdate) else self


def whole_of(update: Update) -> Update:
    """Return the update as its adapter has it, without any around it."""
    while isinstance(update, Wrapper):
        update = update.inner
    return update
