"""Patterns of the dotted names of modules and parameters in the tables of model families.

A pattern has one or more components separated by dots, such as ``mlp.experts``, ``layers.#.self_attn`` or ``*_embeddings``.
``#`` stands for a component that is a number, and ``*`` for any text inside a component. A leading ``^`` anchors the pattern at
the beginning of a name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

NUMBER: Final = "#"
LONGEST: Final = 200
"""The most characters in a pattern."""

DIGITS: Final = 9
"""The most digits in the number of a layer or an expert. A longer one is treated as a name."""

_NUMBERS: Final = re.compile(rf"(?<![^.])[0-9]{{1,{DIGITS}}}(?![^.])")
_COMPONENT: Final = re.compile(r"[\w\-]*\*?[\w\-]*|#")
"""A component of a pattern: text with at most one ``*``, so that matching takes linear time."""


class PatternError(ValueError):
    """A pattern cannot be read; the message says why."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """The components at the end of a name, or all its components if `anchored`."""

    components: tuple[str, ...]
    anchored: bool

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read a pattern.

        Raises:
            PatternError: it is empty, too long, or has a component that is neither text nor ``#``.
        """
        return cls(*parse_components(text))

    def matches(self, template: Sequence[str]) -> bool:
        """Return whether the components of a name, with ``#`` for its numbers, match the pattern."""
        start = len(template) - len(self.components)
        if start < 0 or (self.anchored and start):
            return False
        return all(map(component_fits, template[start:], self.components))


def component_fits(part: str, expected: str) -> bool:
    """Return whether a component of a name matches a component of a pattern."""
    if part == expected:
        return True
    before, star, after = expected.partition("*")
    is_long_enough = len(part) >= len(before) + len(after)
    return bool(star) and is_long_enough and part.startswith(before) and part.endswith(after)


def parse_components(text: str) -> tuple[tuple[str, ...], bool]:
    """Return the components of a pattern, and whether it begins with ``^``.

    Raises:
        PatternError: it is empty, too long, or has a component that is neither text nor ``#``.
    """
    if len(text) > LONGEST:
        raise PatternError(f"it has more than {LONGEST} characters")
    components = tuple(text.removeprefix("^").split("."))
    if not all(part and _COMPONENT.fullmatch(part) for part in components):
        raise PatternError("a component is empty or neither a name, with at most one *, nor #")
    return components, text.startswith("^")


def template(name: str, literal: Collection[str] = ()) -> str:
    """Return a name with ``#`` for each component that is a number, except for those in `literal`."""
    if not literal:
        return _NUMBERS.sub(NUMBER, name)
    return _NUMBERS.sub(lambda found: found[0] if found[0] in literal else NUMBER, name)


def numbers(name: str, literal: Collection[str] = ()) -> list[str]:
    """Return what `template` replaces in a name, in order."""
    return [part for part in name.split(".") if is_number(part) and part not in literal]


def fill(template: str, numbers: Sequence[str]) -> str:
    """Return a template with each ``#`` replaced by a number, in order. A ``#`` without a number stays."""
    rest = iter(numbers)
    return ".".join(next(rest, part) if part == NUMBER else part for part in template.split("."))


def is_number(part: str) -> bool:
    """Return whether a component of a name is a number, such as that of a layer or an expert."""
    return len(part) <= DIGITS and part.isascii() and part.isdecimal()
