"""The tensors of a plan: summed up by module (``q_proj x 30``), or all of them, in the order in which a person counts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from loratool.cli.rendering import size
from loratool.cli.table import print_table


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor's name, what happens to it, a word a column, and its sizes in bytes, one a column."""

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
    """A line for the tensors of the same module in all layers to which the same happens."""
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
    """The module that a tensor belongs to, without its place: ``q_proj``, ``embed_tokens``; ``q_proj.bias`` for a bias."""
    parts = name.removesuffix(".weight").split(".")
    place = len(parts) - (2 if parts[-1] == "bias" and parts[1:] else 1)
    return ".".join(parts[place:])
