"""Parameters that share their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loratool.architecture.pattern import Pattern, PatternError


@dataclass(frozen=True, slots=True)
class Tie:
    """Parameters of one model that share their values, by the last components of their names.

    Attributes:
        parameters: patterns of the parameters. A checkpoint keeps the first one; if it lacks that, they are not tied.
        always: whether they are tied whatever the configuration says. If not, they are tied only if the configuration ties the
            output head to the input embedding.
    """

    parameters: tuple[Pattern, ...]
    always: bool

    @classmethod
    def parse(cls, parameters: Sequence[str], *, always: bool) -> Tie:
        """Parse an entry of a table.

        Raises:
            PatternError: a name cannot be read, or there are fewer than two.
        """
        if len(parameters) < 2:
            raise PatternError("it takes two parameters to share values")
        return cls(tuple(map(Pattern.parse, parameters)), always)

    def group(self, name: Sequence[str]) -> list[tuple[str, ...]]:
        """Return the names of all parameters tied to `name`, itself included, in order; an empty list if it is not tied."""
        fitting = [pattern for pattern in self.parameters if pattern.matches(name)]
        if not fitting:
            return []
        own = max(fitting, key=lambda pattern: len(pattern.components))
        before = tuple(name[: len(name) - len(own.components)])
        return [(*before, *other.components) for other in self.parameters]
