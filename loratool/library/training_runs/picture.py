"""The picture of a training run: its loss, and AdaLoRA's ranks over time or DyLoRA's loss by rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.errors import printable
from loratool.library.reporting.picture import drawn
from loratool.training.log import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_training(log: Path, file: Path, title: str, *, loss_by_rank: Mapping[int, float], force: bool) -> None:
    """Draw the run in `log` as the picture `file`.

    Raises:
        OutputError: `file` exists (without `force`) or cannot be written.
        LoratoolError: matplotlib is not installed.
    """
    entries = list(read_log(log))
    steps = [entry for entry in entries if "lr" in entry and "step" in entry]
    evaluations = [entry for entry in entries if "validation_loss" in entry]
    ranks = [
        (entry["step"], sorted(entry["ranks"].values())) for entry in steps if isinstance(entry.get("ranks"), dict)
    ]
    with drawn(file, force=force) as figure:
        panels = 2 if ranks or loss_by_rank else 1
        axes = figure.subplots(1, panels, squeeze=False)[0]
        _draw_loss(axes[0], steps, evaluations)
        if ranks:
            _draw_ranks(axes[1], [*ranks, (steps[-1]["step"], ranks[-1][1])])
        elif loss_by_rank:
            _draw_loss_by_rank(axes[1], loss_by_rank)
        figure.suptitle(printable(title), parse_math=False)


def _draw_loss(axes: Axes, steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> None:
    axes.plot([entry["step"] for entry in steps], [entry["loss"] for entry in steps], linewidth=1, label="of each step")
    if evaluations:
        axes.plot(
            [entry["step"] for entry in evaluations],
            [entry["validation_loss"] for entry in evaluations],
            marker="o",
            label="held out",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_ranks(axes: Axes, ranks: Sequence[tuple[int, Sequence[int]]]) -> None:
    """Draw the average rank of all modules, and the range from the smallest to the largest, as steps."""
    steps = [step for step, _ in ranks]
    least, largest = [each[0] for _, each in ranks], [each[-1] for _, each in ranks]
    axes.fill_between(steps, least, largest, step="post", alpha=0.2, label="all modules")
    axes.step(steps, [sum(each) / len(each) for _, each in ranks], where="post", label="on average")
    axes.set_xlabel("step")
    axes.set_ylabel("rank")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_loss_by_rank(axes: Axes, losses: Mapping[int, float]) -> None:
    axes.plot(list(losses), list(losses.values()), marker="o")
    axes.set_xlabel("rank")
    axes.set_ylabel("loss after training")
    axes.grid(alpha=0.3)
