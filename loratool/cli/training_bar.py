"""Progress of a training run on stderr: a bar on a terminal, or an occasional line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final

import click

from loratool.cli.rendering import SECONDS_ESTIMATED_FROM, ProgressBar, size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from loratool.training.loop import StepReport

SECONDS_BETWEEN_LINES: Final = 20.0
BAR_CELLS: Final = 12
BESIDE_FIGURES: Final = len("training") + BAR_CELLS + len("12:34:56") + 4
"""The width of the progress line without the figures and the step count."""

SMOOTHING: Final = 0.9
"""The weight of the previous value in the moving average of the displayed loss."""


def _fitting(figures: Sequence[str], room: int) -> str:
    """Join as many of the first figures as fit."""
    fitting = next((count for count in range(len(figures), 0, -1) if len("  ".join(figures[:count])) <= room), 0)
    return "  ".join(figures[:fitting])


class TrainingBar(ProgressBar):
    """Progress of loading and scoring, and then of steps: loss, tokens per second, memory and time left."""

    def __init__(self) -> None:
        super().__init__(unit="")
        self._steps = 0
        self._loss: float | None = None
        self._held_out: list[str] = []
        self._said_at = time.monotonic()
        self._training: Progress | None = None
        self._row: TaskID | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end_steps()
        super().__exit__(kind, error, traceback)

    def begin(self, label: str, total: int) -> None:
        self._end_steps()
        super().begin(label, total)

    def begin_steps(self, done: int, steps: int) -> None:
        self._steps = steps
        super().__exit__(None, None, None)
        if done:
            self._say(f"Continuing after step {done:,} of {steps:,}")
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._training = Progress(
            TextColumn("training"),
            BarColumn(bar_width=BAR_CELLS),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}"),
            speed_estimate_period=SECONDS_ESTIMATED_FROM,
            console=Console(stderr=True),
            transient=True,
        )
        self._training.start()
        self._row = self._training.add_task("training", total=steps, completed=done, figures="")

    def stepped(self, report: StepReport) -> None:
        shown = report.loss if self._loss is None else SMOOTHING * self._loss + (1 - SMOOTHING) * report.loss
        self._loss = shown
        speed = report.tokens / report.seconds
        figures = [f"loss {shown:.3f}", *self._held_out, f"{speed:,.0f} tok/s", size(report.peak_memory_bytes)]
        if self._training is not None and self._row is not None:
            counts = 2 * len(str(self._steps)) + 1
            room = self._training.console.width - BESIDE_FIGURES - counts
            self._training.update(self._row, completed=report.step, figures=_fitting(figures, room))
        elif time.monotonic() - self._said_at > SECONDS_BETWEEN_LINES:
            self._say(f"step {report.step:,} of {self._steps:,}: {'  '.join(figures)}")

    def evaluated(self, step: int, loss: float) -> None:
        self._held_out = [f"held out {loss:.3f}"]
        if self._training is None:
            self._say(f"step {step:,} of {self._steps:,}: held-out loss {loss:.4f}")

    def stopping(self) -> None:
        self._say("Stopping after this step; press again to stop at once")

    def _say(self, line: str) -> None:
        self._said_at = time.monotonic()
        if self._training is not None:
            self._training.console.print(line)
        else:
            click.echo(line, err=True)

    def _end_steps(self) -> None:
        if self._training is not None:
            self._training.stop()
            self._training = None
