"""Progress reports of a training run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from loratool.library.reporting.progress import Progress, Silent

if TYPE_CHECKING:
    from loratool.training.loop import StepReport


class TrainProgress(Progress, Protocol):
    """Receiver of progress reports that also receives training steps."""

    def begin_steps(self, done: int, steps: int) -> None:
        """Begin training, or continue it after `done` of its `steps`."""

    def stepped(self, report: StepReport) -> None:
        """Report a finished step."""

    def evaluated(self, step: int, loss: float) -> None:
        """Report the loss of the held-out samples after `step` steps."""

    def stopping(self) -> None:
        """Report that the run was interrupted and ends after the current step."""


class SilentTraining(Silent):
    """Receiver that ignores all reports."""

    def begin_steps(self, done: int, steps: int) -> None:
        pass

    def stepped(self, report: StepReport) -> None:
        pass

    def evaluated(self, step: int, loss: float) -> None:
        pass

    def stopping(self) -> None:
        pass
