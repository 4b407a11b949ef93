"""The tensors of a plan in a table, grouped by module (``q_proj x 30``) or one by one, in numerical order of layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from loratool.cli.rendering import size
from loratool.cli.table import print_table


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor's name, one word per column on what happens to it, and its sizes in bytes, one per column."""

    name: str
    words: tuple[str, ...]
    sizes: tuple[int, ...]


def print_plan(tensors: Sequence[PlannedTensor], words: Sequence[str], sizes: Sequence[str], *, verbose: bool) -> None:
    """Print a table with the columns TENSOR, `words` and `sizes`; a line for each tensor if `verbose`."""
    ordered = sorted(tensors, key=lambda tensor: natural_order(tensor.name))
    lines = ordered if verbose else _summed(ordered)
    rows = [[line.name, *line.words, *map(size, line.sizes)] for line in lines]
    print_table(["TENSOR", *words, *sizes], rows, right=sizes, give_way=[*words, *sizes])


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts ``layers.2`` before ``layers.10``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,18})", name)]


def _summed(tensors: Sequence[PlannedTensor]) -> list[PlannedTensor]:
    """Group tensors of the same module in different layers if the same happens to them."""
    groups: dict[tuple[str, tuple[str, ...]], list[PlannedTensor]] = {}
    for tensor in tensors:
        groups.setdefault((_module(tensor.name), tensor.words), []).append(tensor)
    return [
        PlannedTensor(
            module if len(group) == 1 else f"{module} x {len(group):,}",
            words,
            tuple(map(sum, zip(*(tensor.sizes for tensor in group), strict=True))),
        )
        for (module, words), group in groups.items()
    ]


def _module(name: str) -> str:
    """Return the last component of a tensor's module: ``q_proj``, ``embed_tokens``; ``q_proj.bias`` for a bias."""
    parts = name.removesuffix(".weight").split(".")
    place = len(parts) - (2 if parts[-1] == "bias" and parts[1:] else 1)
    return ".".join(parts[place:])
