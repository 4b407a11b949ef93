"""How a training run tells how far it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from loratool.library.progress import Progress, Silent

if TYPE_CHECKING:
    from loratool.training.loop import StepReport


class TrainProgress(Progress, Protocol):
    """Progress that is also told of steps."""

    def begin_steps(self, done: int, steps: int) -> None:
        """Training begins, or goes on after `done` of its `steps`."""

    def stepped(self, report: StepReport) -> None:
        """A step is made."""

    def evaluated(self, step: int, loss: float) -> None:
        """After `step` steps the samples that were held out have this loss."""

    def stopping(self) -> None:
        """The run was interrupted, and ends after the step that it is in."""


class SilentTraining(Silent):
    """Progress of training that nobody watches."""

    def begin_steps(self, done: int, steps: int) -> None:
        pass

    def stepped(self, report: StepReport) -> None:
        pass

    def evaluated(self, step: int, loss: float) -> None:
        pass

    def stopping(self) -> None:
        pass
