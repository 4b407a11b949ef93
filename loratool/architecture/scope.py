"""A model and the models inside it, such as the language model of a multimodal one, each with its family's tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from loratool.architecture.family import Family
from loratool.architecture.pattern import NUMBER, is_number
from loratool.architecture.renaming import Renaming, Spelling
from loratool.architecture.roles import Role
from loratool.architecture.tables import family_of, generic

DEEPEST: Final = 4
"""The most levels of nested configurations. Deeper ones have no tables of their own."""

Components = tuple[str, ...]


@dataclass(frozen=True)
class Scope:
    """The tables of a model, and those of the `parts` inside it, with the places of the parts among its modules."""

    family: Family
    config: Mapping[str, Any]
    parts: tuple[tuple[Components, Scope], ...]

    @classmethod
    def of(cls, config: Mapping[str, Any], depth: int = 0) -> Scope:
        """Return the scope of a model with this ``config.json``.

        Raises:
            LoratoolError: the table of its family cannot be read.
        """
        model_type = config.get("model_type")
        family = family_of(model_type) if isinstance(model_type, str) else Family("")
        parts = []
        for key, paths in {**generic().parts, **family.parts}.items():
            inside = config.get(key)
            if isinstance(inside, Mapping) and depth < DEEPEST:
                scope = cls.of(inside, depth + 1)
                parts += [(path, scope) for path in paths]
        return cls(family, config, tuple(parts))

    def around(self, name: Sequence[str]) -> Iterator[tuple[Scope, Components]]:
        """Yield each model that a parameter with this canonical name belongs to, the innermost first, and its name there."""
        part, start = self._part(name)
        if part is not None:
            yield from part.around(name[start:])
        yield self, tuple(name)

    def renamed(self, name: Components) -> Components:
        """Return the canonical name of a parameter, whichever program's name is given."""
        for renaming in self._renamings:
            name = renaming.apply(name)
        part, start = self._part(name)
        return name if part is None else (*name[:start], *part.renamed(name[start:]))

    def reverted(self, name: Components, spelling: Spelling) -> Components:
        """Return the name that `spelling` gives the parameter with this canonical name."""
        part, start = self._part(name)
        if part is not None:
            name = (*name[:start], *part.reverted(name[start:], spelling))
        for renaming in reversed(self._renamings):
            name = renaming.revert(name, spelling)
        return name

    @cached_property
    def literals(self) -> frozenset[str]:
        """Numbers that are spelled out in the tables' names."""
        own = self.family.literals | generic().literals
        return own.union(*(part.literals for _, part in self.parts))

    @cached_property
    def ends(self) -> dict[str, set[Role]]:
        """The roles that a module may have by the last component of its name. A component that is renamed may have any role."""
        found: dict[str, set[Role]] = {}
        for pattern, role in (*self.family.roles, *generic().roles):
            found.setdefault(pattern.components[-1], set()).add(role)
        for end in (end for renaming in self._renamings for end in renaming.old):
            found.setdefault(end, set()).update(Role)
        for _, part in self.parts:
            for end, roles in part.ends.items():
                found.setdefault(end, set()).update(roles)
        return found

    @property
    def _renamings(self) -> tuple[Renaming, ...]:
        return self.family.renamings + generic().renamings

    def _part(self, name: Sequence[str]) -> tuple[Scope | None, int]:
        """Return the inner model that a parameter belongs to, or None, and the index where its name in that model begins.

        If several places match, the first one in the name decides.
        """
        for start, component in enumerate(name):
            if component == NUMBER or is_number(component):
                break
            for path, part in self.parts:
                if tuple(name[start : start + len(path)]) == path:
                    return part, start + len(path)
        return None, 0
