"""Parameters that share their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loratool.architecture.pattern import Pattern, PatternError


@dataclass(frozen=True, slots=True)
class Tie:
    """Parameters of one model that share their values, by the last components of their names.

    Attributes:
        parameters: the first is the one that a checkpoint keeps. Where it lacks that, they are not tied.
        always: they do whatever the configuration says; otherwise only where it ties the output head to the input embedding.
    """

    parameters: tuple[Pattern, ...]
    always: bool

    @classmethod
    def parse(cls, parameters: Sequence[str], *, always: bool) -> Tie:
        """Read an entry of a table.

        Raises:
            PatternError: a name cannot be read, or there are fewer than two.
        """
        if len(parameters) < 2:
            raise PatternError("it takes two parameters to share values")
        return cls(tuple(map(Pattern.parse, parameters)), always)

    def group(self, name: Sequence[str]) -> list[tuple[str, ...]]:
        """Return the names of all that share the values of the parameter `name`, in order; none if it is none of them."""
        fitting = [pattern for pattern in self.parameters if pattern.matches(name)]
        if not fitting:
            return []
        own = max(fitting, key=lambda pattern: len(pattern.components))
        before = tuple(name[: len(name) - len(own.components)])
        return [(*before, *other.components) for other in self.parameters]
