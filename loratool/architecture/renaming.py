"""Conversion between the name of a parameter on disk and the name that transformers gives it in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from loratool.architecture.pattern import NUMBER, PatternError, is_number, parse_components


class Spelling(Enum):
    """The program whose names are used."""

    STORED = "stored"
    TRANSFORMERS_4 = "transformers 4"
    TRANSFORMERS_5 = "transformers 5"


class Since(Enum):
    """The programs that have the new name in memory. All others have the old one."""

    ALWAYS = "stored"
    """Every version of transformers that renames at all. Only the checkpoint has the old name."""
    VERSION_5 = "since_5"
    """transformers 5. Version 4 has the old name, like the checkpoint."""
    LEGACY = "legacy"
    """All programs that write checkpoints today. Only old files have the old name."""


@dataclass(frozen=True, slots=True)
class Renaming:
    """A replacement of components in a stored name.

    Attributes:
        old, new: the components before and after, with the same number of ``#``. An empty `new` removes a prefix.
        anchored: whether `old` is replaced only at the beginning of a name. Otherwise its first occurrence is replaced.
        since: the programs that have the new name.
    """

    old: tuple[str, ...]
    new: tuple[str, ...]
    anchored: bool
    since: Since

    @classmethod
    def parse(cls, old: str, new: str, since: Since) -> Renaming:
        """Parse a line of a table.

        Raises:
            PatternError: a side cannot be read, or the two do not have the same numbers.
        """
        left, anchored = parse_components(old)
        right = parse_components(new)[0] if new else ()
        if any("*" in part for part in (*left, *right)):
            raise PatternError("a name that is exchanged cannot have a *")
        if left.count(NUMBER) != right.count(NUMBER):
            raise PatternError("its two sides have different counts of #")
        if not right and not anchored:
            raise PatternError("only a prefix, with ^ in front, can be removed")
        return cls(left, right, anchored, since)

    @property
    def literals(self) -> frozenset[str]:
        """Numbers that are spelled out in the components."""
        return frozenset(part for part in (*self.old, *self.new) if is_number(part))

    def apply(self, name: tuple[str, ...]) -> tuple[str, ...]:
        """Return the components of the name in memory."""
        return _exchange(name, self.old, self.new, anchored=self.anchored)

    def revert(self, name: tuple[str, ...], spelling: Spelling) -> tuple[str, ...]:
        """Return the components of the name that `spelling` has."""
        has_old = {
            Since.ALWAYS: (Spelling.STORED,),
            Since.VERSION_5: (Spelling.STORED, Spelling.TRANSFORMERS_4),
            Since.LEGACY: (),
        }
        if spelling not in has_old[self.since]:
            return name
        if not self.new:
            return name if name[: len(self.old)] == self.old else (*self.old, *name)
        return _exchange(name, self.new, self.old, anchored=self.anchored)


def _exchange(name: tuple[str, ...], old: tuple[str, ...], new: tuple[str, ...], *, anchored: bool) -> tuple[str, ...]:
    """Replace `old` by `new`, unless `new` is there already: ``experts`` by ``mlp.experts``, but not in ``mlp.experts``."""
    within = [at for at in range(len(new) - len(old) + 1) if new[at : at + len(old)] == old]
    for start in range(1 if anchored else len(name) - len(old) + 1):
        found = name[start : start + len(old)]
        is_done = any(at <= start and _fits(name[start - at : start - at + len(new)], new) for at in within)
        if not is_done and _fits(found, old):
            taken = iter([part for part, expected in zip(found, old, strict=True) if expected == NUMBER])
            between = tuple(next(taken) if part == NUMBER else part for part in new)
            return (*name[:start], *between, *name[start + len(old) :])
    return name


def _fits(found: Sequence[str], expected: Sequence[str]) -> bool:
    return len(found) == len(expected) and all(
        part == wanted or (wanted == NUMBER and is_number(part)) for part, wanted in zip(found, expected, strict=True)
    )
