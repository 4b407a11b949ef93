"""Tables in a terminal. Names are never cut, since users type them; other columns are shortened instead."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import click

from loratool.cli.rendering import cells_of, fitted, shown

LONGEST_NAME: Final = 32
"""If the table would be too wide, a name of more cells than this gets a line of its own."""

LEAST_CELLS: Final = 8
"""The least width to which a text is cut."""

GAP: Final = 2


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = (), give_way: Sequence[str] = ()
) -> None:
    """Print a table. On a terminal it is made to fit the width as far as its names allow.

    The first column holds names. Columns in `right` hold numbers, are aligned to the right and never cut. In a table that is
    too wide, texts in the `give_way` columns are cut. If that is not enough, these columns are left out, in their order, until
    it fits.
    """
    cells = [[shown(cell) for cell in row] for row in rows]
    widths = [max(map(cells_of, column)) for column in zip(columns, *cells, strict=True)]
    if sys.stdout.isatty():
        least = {
            columns.index(column): max(LEAST_CELLS, cells_of(column)) for column in give_way if column not in right
        }
        order = [columns.index(column) for column in give_way]
        room = shutil.get_terminal_size().columns
        names = [cells_of(row[0]) for row in cells if cells_of(row[0]) <= LONGEST_NAME]
        usual = max([cells_of(columns[0]), *names])
        widths = _narrowed(widths, least, order, room) or _narrowed([usual, *widths[1:]], least, order, room, drop=True)
    to_the_right = [column in right for column in columns]
    click.secho(_line(columns, widths, to_the_right), bold=True)
    for row in cells:
        if cells_of(row[0]) > widths[0]:
            click.echo(row[0])
            row = ["", *row[1:]]
        click.echo(_line(row, widths, to_the_right))


def _narrowed(widths: Sequence[int], least: Mapping[int, int], order: Sequence[int], room: int, *,
              drop: bool = False) -> list[int]:  # fmt: skip
    """Return widths of the columns that fit into `room`, 0 for one that is left out; an empty list if none fit.

    `least` holds the least width of each column that may be cut. With `drop`, columns may be left out, in this `order`.
    """
    for dropped in range(len(order) + 1 if drop else 1):
        fitting = [0 if place in order[:dropped] else width for place, width in enumerate(widths)]
        for place in order:
            if place in least and fitting[place]:
                fitting[place] -= max(0, min(_total(fitting) - room, fitting[place] - least[place]))
        if _total(fitting) <= room or (drop and dropped == len(order)):
            return fitting
    return []


def _total(widths: Sequence[int]) -> int:
    return sum(width + GAP for width in widths if width) - GAP


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    kept = [fitted(cell, width, right=r) for cell, width, r in zip(cells, widths, right, strict=True) if width]
    return (" " * GAP).join(kept).rstrip()
