"""Names that programs give to the same part of a model, such as ``model`` and ``transformer``."""

from __future__ import annotations

from functools import cache

from loratool.architecture.tables import generic


def same_part(name: str) -> str:
    """Return one name for all that programs give to the part of a model called `name`; itself if there is no other."""
    return _first_names().get(name, name)


@cache
def _first_names() -> dict[str, str]:
    return {name: names[0] for names in generic().same_part for name in names}
