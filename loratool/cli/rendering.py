"""Formatting for the terminal: sizes, ages, names, facts, JSON and progress."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import click

from loratool.cli.sentences import on_stderr
from loratool.formats.kinds import kind_named

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from loratool.merging.delivery import Delivery
    from registry import AdapterSummary


def print_json(value: Any) -> None:
    """Print one JSON value on stdout. It is ASCII, so that no name can control the terminal or break an encoding."""
    click.echo(json.dumps(value, indent=2))


def console() -> Console:
    """Return a console on stdout. If that is not a terminal, it is wide enough that nothing is cut."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 200
    return Console(width=width, highlight=False, soft_wrap=False)


def size(nbytes: int) -> str:
    """Format a number of bytes: ``512 B``, ``1.2 MB``, ``2.20 GB`` (powers of 1,000)."""
    value, unit = float(nbytes), "B"
    for bigger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, bigger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"


def count(number: int | None) -> str:
    """Format a number of parameters: ``135 M``, ``1.1 B``."""
    if number is None:
        return "-"
    value, unit = float(number), ""
    for bigger in (" K", " M", " B", " T"):
        if value < 999.5:
            break
        value, unit = value / 1000, bigger
    return f"{value:.3g}{unit}"


def age(moment: datetime) -> str:
    """Format the time since a moment in one unit: ``now``, ``5 min``, ``3 h``, ``12 d``, ``2 y``."""
    seconds = (datetime.now(UTC) - moment).total_seconds()
    for unit, length in (("y", 31_557_600), ("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return "now"


def duration(seconds: float) -> str:
    """Format a number of seconds: ``0.8 s``, ``12 s``, ``3 min 20 s``."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{round(seconds) // 60} min {round(seconds) % 60} s"


def counted(number: int, noun: str) -> str:
    """Format a number with its noun: ``1 base``, ``2 bases``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def listed(items: Sequence[str], most: int = 8) -> str:
    """Return the first of `items`, one per line, and the number of further ones."""
    more = len(items) - most
    return "\n".join([*items[:most], *([f"and {more:,} more"] if more > 0 else [])])


def percent(share: float, digits: int = 3) -> str:
    """Format a share as ``12.345%``. A share above 0 is never shown as 0."""
    least = 10.0 ** -(digits + 2)
    return f"<{least:.{digits}%}" if 0 < share < least else f"{share:.{digits}%}"


def delivered(delivery: Delivery, *, verbose: bool = False) -> str:
    """Return the share of an update that the stored numbers carry: ``98.3% of the update; 7.1% of elements changed``.

    With `verbose`, the noise is added: ``; noise 5.5% of the weights``.
    """
    noise = f"; noise {delivery.noise:.1%} of the weights" if verbose else ""
    return f"{delivery.share:.1%} of the update; {delivery.changed:.1%} of elements changed{noise}"


def bar(share: float, cells: int) -> str:
    """Return a bar over a `share` (0 to 1) of `cells`, to an eighth of a cell; of ``#`` if stdout cannot encode blocks."""
    whole, eighths = divmod(round(share * cells * 8), 8)
    drawn = "█" * whole + "▏▎▍▌▋▊▉"[max(0, eighths - 1) : eighths]
    try:
        drawn.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "#" * round(share * cells)
    return drawn


def shown_path(path: Path | str) -> str:
    """Format a path for the user: relative if it is inside the working folder."""
    return shown(near(path))


def near(path: Path | str) -> str:
    """Return a path as it is, relative if it is inside the working folder."""
    absolute = os.path.abspath(path)
    relative = os.path.relpath(absolute)
    return absolute if relative == ".." or relative.startswith("../") else relative


def shown_adapter(reference: str) -> str:
    """Return the reference of a catalogued adapter, or the path of another; for a PEFT folder, the folder's path."""
    path = Path(reference)
    if path.suffix not in {".safetensors", ".st"}:
        return reference
    return shown_path(path.parent if path.name == "adapter_model.safetensors" else path)


def shown(text: str) -> str:
    """Return `text` without characters that could control the terminal."""
    if text.isprintable():
        return text
    from loratool.errors import printable

    return printable(text)


def catalogued(record: AdapterSummary) -> str:
    """Return the reference of an adapter's entry, or ``no`` without one."""
    return record.reference if record.is_catalogued else "no"


def ranks(kind: str, rank: int | None) -> str:
    """Format the rank of an adapter. A DyLoRA has all ranks up to its largest: ``1..8``."""
    if rank is None:
        return "-"
    return f"1..{rank}" if kind_named(kind).nested and rank > 1 else str(rank)


def targets(modules: Sequence[str] | str | None) -> str:
    """Format target modules in short: ``q k v o gate up down``."""
    if modules is None:
        return "-"
    names = [modules] if isinstance(modules, str) else modules
    order = {name: place for place, name in enumerate(("q", "k", "v", "o", "gate", "up", "down"))}
    short = [name.removesuffix("_proj") if name.removesuffix("_proj") in order else name for name in names]
    return " ".join(sorted(short, key=lambda name: (order.get(name, len(order)), name)))


def fitted(cell: str, width: int, *, right: bool = False) -> str:
    """Cut or pad a cell to `width`. A wide character takes two cells."""
    if cells_of(cell) > width:
        if cell.isascii():
            cell = cell[: width - 1] + "…"
        else:
            from rich.cells import set_cell_size

            cell = set_cell_size(cell, width - 1) + "…"
    gap = " " * (width - cells_of(cell))
    return gap + cell if right else cell + gap


def cells_of(text: str) -> int:
    """Return the number of terminal cells that `text` takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print pairs of a label and a value, aligned and indented by two spaces.

    Empty values are left out. On a terminal, long values are wrapped between words; commands stay on one line for copying.
    """
    pairs = [(key, value) for key, value in facts if value]
    width = max((len(key) for key, _ in pairs), default=0)
    room = shutil.get_terminal_size().columns - width - 4 if sys.stdout.isatty() else sys.maxsize
    for key, value in pairs:
        lines = [part for line in value.split("\n") for part in _wrapped(shown(line), room)]
        for place, line in enumerate(lines):
            click.echo(f"  {click.style((key if place == 0 else '').ljust(width), dim=True)}  {line}")


def _wrapped(line: str, room: int) -> list[str]:
    """Split a line between words into parts of at most `room` cells where possible."""
    if cells_of(line) <= room or line.startswith("loratool "):
        return [line]
    parts = [""]
    for word in line.split(" "):
        longer = f"{parts[-1]} {word}" if parts[-1] else word
        if parts[-1] and cells_of(longer) > room:
            parts.append(word)
        else:
            parts[-1] = longer
    return [part.rstrip() for part in parts]


def print_notes(notes: Iterable[str]) -> None:
    """Print notes on stderr, so that stdout holds only the result."""
    for note in notes:
        said = on_stderr(f"note: {shown(note)}").removeprefix("note: ")
        click.echo(click.style("note: ", fg="yellow") + said, err=True)


BAR_CELLS: Final = 16
FIGURES_CELLS: Final = 53
"""The largest width of bar, bytes, speed and time left in a line of progress. The label gets the rest."""

LEAST_LABEL_CELLS: Final = 8
SECONDS_ESTIMATED_FROM: Final = 3600.0
"""Seconds of history for the estimate of the time left: long enough for steps that take minutes."""


class ProgressBar(AbstractContextManager["ProgressBar"]):
    """Progress on stderr, with the time left; silent if stderr is not a terminal.

    It counts bytes and shows their rate, or counts the `unit` given.
    """

    def __init__(self, unit: str = "bytes") -> None:
        self._unit = unit
        self._label = ""
        self._has_said_so = False
        self._bars: Bars | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=BAR_CELLS),
                *(
                    [DownloadColumn(), TransferSpeedColumn()]
                    if self._unit == "bytes"
                    else [MofNCompleteColumn(), TextColumn(self._unit)]
                ),
                TimeRemainingColumn(),
                speed_estimate_period=SECONDS_ESTIMATED_FROM,
                console=Console(stderr=True),
                transient=True,
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def begin(self, label: str, total: int) -> None:
        self._label = label
        if self._bars is not None:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task = self._bars.add_task(self._fitting(label), total=total)
            self._bars.start()

    def advance(self, count: int) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task, count)

    def retrying(self, tries: int) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, description=self._fitting(f"{self._label}, try {tries + 1}"))
        elif not self._has_said_so:
            self._has_said_so = True
            print_notes(["the connection broke off; trying again"])

    def _fitting(self, label: str) -> str:
        room = FIGURES_CELLS if self._bars is None else self._bars.console.width - FIGURES_CELLS
        return label if cells_of(label) <= room else fitted(label, max(LEAST_LABEL_CELLS, room))
