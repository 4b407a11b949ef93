"""What a parameter is for."""

from __future__ import annotations

from enum import Enum
from typing import Final


class Role(Enum):
    """What the module that a parameter belongs to does with it."""

    TOKENS = "tokens"
    """The input embedding: a row for each token of the vocabulary."""
    EMBEDDING = "embedding"
    """Another table of rows that are looked up: positions, types, codebooks."""
    HEAD = "head"
    """The output head of a model that writes tokens: a row for each."""
    CLASSIFIER = "classifier"
    """The output head of another model: a row for each of its labels."""
    LINEAR = "linear"
    """A linear layer: nn.Linear, or a Conv1D, which stores the transpose."""
    CONVOLUTION = "convolution"
    NORM = "norm"
    EXPERTS = "experts"
    """A matrix or a vector of one expert, or the stack of those of all."""
    ROUTER = "router"
    """What scores experts, in a module of its own kind."""
    OTHER = "other"

    def fits(self, dimensions: int) -> bool:
        """Return whether a module of this role may have a weight of so many dimensions."""
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
"""Dimensions of the weight, for the roles that say so much."""

BY_DIMENSIONS: Final = {1: Role.NORM, 2: Role.LINEAR, 3: Role.CONVOLUTION, 4: Role.CONVOLUTION, 5: Role.CONVOLUTION}
"""The role of a module whose weight has so many dimensions and whose name says nothing."""
