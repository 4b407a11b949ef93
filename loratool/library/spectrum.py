"""`loratool.spectrum`: the singular values of an adapter's updates, in numbers and as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratool.errors import printable
from loratool.formats.adapter import path_of
from loratool.formats.alpha import Alpha
from loratool.library.places.user_path import user_path
from loratool.library.recording.opening import open_registry
from loratool.library.reporting.picture import drawn, refuse_picture
from loratool.library.resolving.resolve import resolve_adapter
from loratool.ranks.spectrum import Group, flow, group_of, groups, singular_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEPT: Final = 0.9
"""Share of the energy: if all modules have the same rank, the picture shows the rank that keeps this share."""

MOST_NUMBERED: Final = 40
"""Largest number of layers with which each cell of the picture shows its rank as a number."""

ROW_INCHES: Final = 0.22
OTHER: Final = "other"
"""Column of modules outside the layers, such as the output head."""


@dataclass(frozen=True, slots=True)
class SpectrumResult:
    """The singular values of an adapter's updates.

    Attributes:
        name: of the adapter.
        values: singular values of each module's update, in descending order.
        groups: the same for groups of modules.
        plot: the picture, if one was drawn.
    """

    name: str
    values: Mapping[str, tuple[float, ...]]
    groups: tuple[Group, ...]
    plot: Path | None

    @property
    def whole(self) -> Group:
        """All modules as one group."""
        return group_of("all", self.values.values())

    def to_json(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        return {
            "spectrum": {module: list(found) for module, found in self.values.items()},
            "energy": {group.name: list(group.energy) for group in (*self.groups, self.whole)},
            "plot": None if self.plot is None else str(self.plot),
        }


def spectrum(adapter: str | os.PathLike[str], *, plot: str | os.PathLike[str] | None = None,
             force: bool = False, alpha: Alpha | None = None, registry: str | None = None) -> SpectrumResult:  # fmt: skip
    """Compute the singular values of an adapter's updates, by QR of its factors.

    Args:
        adapter: a catalogued name, a path or a Hub id.
        plot: a ``.png``, ``.svg`` or ``.pdf`` file for a heat map by layer and module, of ranks and of norms.
        force: replace a picture that loratool drew.
        alpha: alpha of a bare file that does not state it: a number, or ``rank`` for each module's rank.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.

    Raises:
        LoratoolError, registry.RegistryError: there is no such adapter, or the picture cannot be written.
    """
    picture = None if plot is None else user_path(plot)
    if picture is not None:
        refuse_picture(picture, force=force)
    with open_registry(registry, read_only=True) as catalogue:
        found = resolve_adapter(adapter, catalogue, alpha)
    values = singular_values(found.adapter)
    result = SpectrumResult(found.adapter.name, values, groups(values), picture)
    if picture is not None:
        _draw(result, picture, force=force)
    return result


@dataclass(frozen=True, slots=True)
class _Grid:
    """Modules by type (rows) and layer (columns). ``cells[row][column]`` is a module, or None."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[str | None, ...], ...]


def _grid(modules: Iterable[str]) -> _Grid:
    """Arrange modules in a grid. The first number in a module's name is its layer."""
    places: dict[tuple[str, str], str] = {}
    for module in modules:
        parts = path_of(module)
        layer = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
        column = OTHER if layer is None else parts[layer]
        rest = parts if layer is None else parts[:layer] + parts[layer + 1 :]
        places[".".join(rest), column] = module
    kinds = sorted({kind for kind, _ in places}, key=lambda kind: (flow(kind.rsplit(".", 1)[-1]), kind))
    layers = sorted({column for _, column in places}, key=lambda column: (column == OTHER, len(column), column))
    cells = tuple(tuple(places.get((kind, layer)) for layer in layers) for kind in kinds)
    return _Grid(tuple(_short(kind, kinds) for kind in kinds), tuple(layers), cells)


def _short(kind: str, kinds: Sequence[str]) -> str:
    """Return the shortest end of a dotted name that no other of `kinds` shares."""
    parts = kind.split(".")
    ends = (".".join(parts[start:]) for start in reversed(range(len(parts))))
    return next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in kinds) == 1), kind)


def _draw(result: SpectrumResult, file: Path, *, force: bool) -> None:
    """Draw heat maps of each module's rank (or, if all are the same, the rank that it needs) and of its norm."""
    grid = _grid(result.values)
    lengths = {len(found) for found in result.values.values()}
    if len(lengths) > 1:
        title, ranks = "rank", {module: len(found) for module, found in result.values.items()}
    else:
        title = f"rank that keeps {KEPT:.0%} of the energy (of {lengths.pop()})"
        ranks = {module: _needed(found) for module, found in result.values.items()}
    norms = {module: math.hypot(*found) for module, found in result.values.items()}
    with drawn(file, force=force) as figure:
        figure.set_size_inches(max(7.0, 0.26 * len(grid.columns) + 2), max(4.5, 2 * ROW_INCHES * len(grid.rows) + 2))
        figure.suptitle(printable(result.name), parse_math=False)
        above, below = figure.subplots(2, 1)
        _heat_map(above, grid, ranks, title, numbered=len(grid.columns) <= MOST_NUMBERED)
        _heat_map(below, grid, norms, "norm of the update (Frobenius)", numbered=False)
        below.set_xlabel("layer")


def _heat_map(axes: Axes, grid: _Grid, numbers: Mapping[str, float], title: str, *, numbered: bool) -> None:
    rows = [[math.nan if module is None else numbers[module] for module in row] for row in grid.cells]
    largest = max(numbers.values())
    image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0, vmax=largest)
    axes.set_facecolor("0.9")
    axes.set_title(title, fontsize="medium")
    axes.set_yticks(range(len(grid.rows)), grid.rows, fontsize="small", parse_math=False)
    every = -(-len(grid.columns) // MOST_NUMBERED)
    axes.set_xticks(range(0, len(grid.columns), every), grid.columns[::every], fontsize="x-small")
    axes.figure.colorbar(image, ax=axes)
    for y, row in enumerate(rows if numbered else ()):
        for x, number in enumerate(row):
            if not math.isnan(number):
                ink = "black" if number > 0.6 * largest else "white"
                axes.text(x, y, f"{number:g}", ha="center", va="center", color=ink, fontsize="xx-small")


def _needed(values: tuple[float, ...]) -> int:
    """Return the smallest rank that keeps the share KEPT of the energy; 0 for an update that changes nothing."""
    energy = group_of("", [values]).energy
    return next((rank for rank, kept in enumerate(energy, 1) if kept >= KEPT), 0) if any(values) else 0
