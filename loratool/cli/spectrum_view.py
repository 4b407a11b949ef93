"""A spectrum in a terminal of 80 columns: the singular values as bars, and the energy that each rank keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import click

from loratool.cli.rendering import counted, shown, targets

if TYPE_CHECKING:
    from loratool.library.spectrum import SpectrumResult
    from loratool.ranks.spectrum import Group

BARS: Final = "▁▂▃▄▅▆▇█"
MOST_BARS: Final = 24
MOST_RANKS: Final = 16
"""Up to this many ranks all are shown; otherwise only a selection."""

ENERGY_WIDTH: Final = 8
GROUPS_IN_A_TABLE: Final = 8


def print_spectrum(result: SpectrumResult) -> None:
    """Print the singular values of each group of modules, and the energy kept at each rank, by group and in total."""
    names = {group.name: targets([group.name]) for group in result.groups}
    width = min(16, max(len(name) for name in names.values()))
    bars = max(len(_bars(group)) for group in result.groups)
    click.echo()
    click.secho("singular values, largest to smallest (root mean square over the modules)", bold=True)
    for group in result.groups:
        click.echo(f"  {_fit(names[group.name], width)}  {_values(group, bars)}")
    click.echo()
    click.secho("energy kept at each rank", bold=True)
    columns = [*result.groups, result.whole] if result.groups[1:] else list(result.groups)
    for start in range(0, len(columns), GROUPS_IN_A_TABLE):
        for line in _table(columns[start : start + GROUPS_IN_A_TABLE], len(result.whole.energy)):
            click.echo(line)


def _values(group: Group, width: int) -> str:
    """Format a group as ``1.24 █▅▃▂▁ 0.01  30 modules``. The bars are relative to the first value and take `width` cells."""
    first, last = (group.values[0], group.values[-1]) if group.values else (0, 0)
    bars = click.style(f"{_bars(group):{width}}", fg="cyan")
    return f"{first:8.3g} {bars} {last:<8.2g} {counted(group.modules, 'module')}"


def _bars(group: Group) -> str:
    step = -(-len(group.values) // MOST_BARS) or 1
    return "".join(_bar(value, group.values[0]) for value in group.values[::step])


def _bar(value: float, largest: float) -> str:
    if value <= 0 or largest <= 0:
        return " "
    return BARS[min(len(BARS) - 1, int(value / largest * len(BARS)))]


def _table(groups: Sequence[Group], most: int) -> Iterator[str]:
    heads = [_fit(targets([group.name]), ENERGY_WIDTH - 1, right=True) for group in groups]
    yield click.style("  rank" + "".join(f" {head}" for head in heads), dim=True)
    for rank in chosen_ranks(most):
        yield f"{rank:6}" + "".join(_energy(group, rank) for group in groups)


def _energy(group: Group, rank: int) -> str:
    """Format the share that `rank` keeps, colored by its size; blank beyond the group's largest rank."""
    if rank > len(group.energy):
        return " " * ENERGY_WIDTH
    kept = group.energy[rank - 1]
    colour = next(
        (name for least, name in ((0.99, "bright_green"), (0.9, "green"), (0.5, "yellow")) if kept >= least), None
    )
    return click.style(f"{_percent(kept):>{ENERGY_WIDTH}}", fg=colour)


def _percent(share: float) -> str:
    """Format a share as ``97.3%``. Only a whole is shown as 100%."""
    text = f"{share:.1%}"
    return "<100%" if text == "100.0%" and share < 1 - 1e-9 else text


def chosen_ranks(most: int) -> list[int]:
    """Return all ranks up to `most`, or if these are many, 1, 2, 3, 4, 6, 8, 12, 16, 24, ... and `most`."""
    if most <= MOST_RANKS:
        return list(range(1, most + 1))
    powers = [2**place for place in range(1, most.bit_length())]
    steps = sorted({1, *powers, *(power * 3 // 2 for power in powers)})
    return [rank for rank in steps if rank < most] + [most]


def _fit(name: str, width: int, *, right: bool = False) -> str:
    text = shown(name)
    text = text if len(text) <= width else text[: width - 1] + "…"
    return f"{text:>{width}}" if right else f"{text:<{width}}"
