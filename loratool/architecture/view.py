"""The part of a parameter that is one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

ALL: Final = slice(None)


@dataclass(frozen=True, slots=True)
class View:
    """The part of a stored parameter that one update sees as a matrix (out, in).

    Attributes:
        expert: the index of the matrix in a stack; None if the parameter is not a stack.
        outputs: its rows in a matrix that packs several, such as query, key and value. Interleaved rows have a step.
        transposed: whether the parameter holds it as (in, out), as GPT-2's Conv1D, embeddings and some experts do.
    """

    expert: int | None = None
    outputs: slice = field(default_factory=lambda: slice(None))
    transposed: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether it is all of a parameter that is not a stack, in either orientation."""
        return self.expert is None and self.outputs == ALL

    def shape_in(self, stored: Sequence[int]) -> tuple[int, ...]:
        """Return the shape, outputs first, of this part of a parameter of the shape `stored`; no outputs of a missing expert."""
        shape = tuple(stored) if self.expert is None else tuple(stored[1:])
        if self.expert is not None and shape and self.expert >= stored[0]:
            shape = tuple(0 for _ in shape)
        shape = shape[::-1] if self.transposed and len(shape) == 2 else shape
        return (len(range(shape[0])[self.outputs]), *shape[1:]) if shape else ()

    def overlaps(self, other: View, stored: Sequence[int]) -> bool:
        """Return whether two parts of a parameter of the shape `stored` have numbers in common."""
        if None not in (self.expert, other.expert) and self.expert != other.expert:
            return False
        outputs = [range(replace(view, outputs=ALL).shape_in(stored)[0])[view.outputs] for view in (self, other)]
        if self.expert != other.expert or self.transposed != other.transposed or not all(outputs):
            return all(outputs)
        return not set(outputs[0]).isdisjoint(outputs[1])

    def turned(self) -> View:
        """The same part of the transposed parameter."""
        return replace(self, transposed=not self.transposed)


WHOLE = View()
"""The view of a parameter that is one matrix (out, in)."""
