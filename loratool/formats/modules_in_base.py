"""Check by name whether a base has the modules of an adapter that loratool does not compute."""

from __future__ import annotations

from collections.abc import Collection
from itertools import accumulate
from typing import Final

from loratool.errors import PlacementError, nearest, quoted
from loratool.formats.identity import Identity
from loratool.formats.names import SUFFIX, is_tied_head
from loratool.formats.table import format_named

SHOWN: Final = 5


def are_names_of_base(found: Identity) -> bool:
    """Return whether the names of an adapter's modules can be compared with those of its base's tensors."""
    return format_named(found.format).has_names_of_base and bool(found.modules)


def refuse_unlanded_names(found: Identity, tensors: Collection[str]) -> None:
    """Raise PlacementError if the base has no tensor in some module of an adapter whose names can be compared.

    Names are compared from one component before the first number (``layers.0.self_attn.q_proj``), because what precedes it
    depends on the model's class. Names without a number are compared by their last component.
    """
    if not are_names_of_base(found):
        return
    ends = {tail for name in tensors for tail in _tails(name)}
    missing = [
        module
        for module in found.modules
        if _own_part(module) not in ends and not is_tied_head(module + SUFFIX, tensors)
    ]
    if not missing:
        return
    lines = []
    for module in missing[:SHOWN]:
        near = nearest(module, tensors)
        lines.append(f"  {quoted(module)}" + (f"  nearest: {', '.join(map(quoted, near))}" if near else ""))
    if missing[SHOWN:]:
        lines.append(f"  and {len(missing) - SHOWN} more")
    raise PlacementError(
        f"{len(missing)} of the modules of {quoted(found.name)} are not in the base; is it the right base?\n"
        + "\n".join(lines)
    )


def _own_part(module: str) -> str:
    parts = module.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    return ".".join(parts[-1:] if number is None else parts[max(0, number - 1) :])


def _tails(tensor: str) -> list[str]:
    """Return the compared parts of a tensor's name and of all modules that contain it."""
    parts = tensor.split(".")
    return [_own_part(path) for path in accumulate(parts, lambda path, part: f"{path}.{part}")]
