"""Find an adapter's kind, modules and ranks from the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from loratool.checkpoint.header import TensorInfo
from loratool.formats.kinds import KINDS, LORA, NEVER_ALONE, VARIANTS, Kind, kind_named

Split = Callable[[str], tuple[str, str] | None]
Parts = Mapping[str, TensorInfo]


def parts_of(tensors: Mapping[str, TensorInfo], split: Split) -> dict[str, dict[str, TensorInfo]]:
    """Return the tensors of each module by part; names that `split` does not know are omitted."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in sorted(tensors.items()):
        where = split(name)
        if where is not None:
            module, part = where
            found.setdefault(module, {})[part] = info
    return found


def kind_of(modules: Mapping[str, Parts]) -> str | None:
    """Return the kind that the parts of all modules show; None if they show none."""
    kinds = {found.name for parts in modules.values() if (found := _kind_of_parts(parts)) is not None}
    if len(kinds) > 1:
        kinds -= set(NEVER_ALONE)
    if len(kinds) > 1 and {kind.name for kind in VARIANTS} & kinds:  # some modules of a variant are plain
        kinds -= {LORA}
    return "mixed" if len(kinds) > 1 else next(iter(kinds), None)


def ranks_of(modules: Mapping[str, Parts], name: str, axes: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return the rank of each module whose tensors show it; `axes` are a format's own axes, by part."""
    rules = tuple((axes or {}).items()) or kind_named(name).ranks or KINDS[LORA].ranks
    found = {module: _rank(parts, rules) for module, parts in modules.items()}
    return {module: rank for module, rank in found.items() if rank is not None}


def _kind_of_parts(parts: Parts) -> Kind | None:
    return next(
        (row for row in KINDS.values() if any(part.startswith(row.parts + row.other_parts) for part in parts)), None
    )


def _rank(parts: Parts, rules: tuple[tuple[str, int], ...]) -> int | None:
    for start, axis in rules:
        for part, info in parts.items():
            if part.startswith(start) and len(info.shape) > axis:
                return info.shape[axis]
    return None
