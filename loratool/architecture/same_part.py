"""Names that programs give to the same part of a model, such as ``model`` and ``transformer``."""

from __future__ import annotations

from functools import cache

from loratool.architecture.tables import generic


def same_part(name: str) -> str:
    """Return one name that stands for all names of the part of a model called `name`, or `name` if it has no others."""
    return _first_names().get(name, name)


@cache
def _first_names() -> dict[str, str]:
    return {name: names[0] for names in generic().same_part for name in names}
