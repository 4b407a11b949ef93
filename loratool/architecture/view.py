"""The part of a parameter that is one matrix."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


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

    def turned(self) -> View:
        """The same part of the transposed parameter."""
        return replace(self, transposed=not self.transposed)


WHOLE = View()
"""The view of a parameter that is one matrix (out, in)."""
