"""The roles of parameters in a model."""

from __future__ import annotations

from enum import Enum
from typing import Final


class Role(Enum):
    """The role of the module that a parameter belongs to."""

    TOKENS = "tokens"
    """The input embedding, with a row for each token of the vocabulary."""
    EMBEDDING = "embedding"
    """Another lookup table of rows: positions, types, codebooks."""
    HEAD = "head"
    """The output head of a model that generates tokens, with a row for each token."""
    CLASSIFIER = "classifier"
    """The output head of another model, with a row for each label."""
    LINEAR = "linear"
    """A linear layer: nn.Linear, or a Conv1D, which stores the transpose."""
    CONVOLUTION = "convolution"
    NORM = "norm"
    EXPERTS = "experts"
    """A matrix or vector of one expert, or the stack of those of all experts."""
    ROUTER = "router"
    """A module of its own kind that scores experts."""
    OTHER = "other"

    def fits(self, dimensions: int) -> bool:
        """Return whether a module of this role may have a weight with this number of dimensions."""
        return dimensions in DIMENSIONS.get(self, range(9))


DIMENSIONS: Final = {
    Role.TOKENS: range(2, 3),
    Role.EMBEDDING: range(2, 3),
    Role.HEAD: range(2, 3),
    Role.CLASSIFIER: range(2, 3),
    Role.LINEAR: range(2, 3),
    Role.ROUTER: range(2, 3),
    Role.CONVOLUTION: range(3, 9),
}
"""The possible numbers of dimensions of the weight, for roles that limit them."""

BY_DIMENSIONS: Final = {1: Role.NORM, 2: Role.LINEAR, 3: Role.CONVOLUTION, 4: Role.CONVOLUTION, 5: Role.CONVOLUTION}
"""The role of a module with an unknown name, by the number of dimensions of its weight."""
