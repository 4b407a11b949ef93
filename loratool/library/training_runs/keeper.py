"""Observers of a training run, which write the log, keep states to resume from, and end the run on an interrupt."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from loratool.interrupts import Deferral
from loratool.library.places.training_run import RunFolder
from loratool.library.training_runs.progress import TrainProgress
from loratool.training.checkpoints import TrainingState
from loratool.training.log import Log, read_log
from loratool.training.recipe import Recipe

if TYPE_CHECKING:
    from loratool.training.loop import StepReport

SECONDS_BETWEEN_STATES: Final = 60.0
LOG_SIZE: Final = "log_size"
"""Fact of a state: the length of the log when it was kept, in bytes."""


class Bystander(Deferral):
    """The observer in all processes but the first, which writes nothing.

    The first signal ends the run after the current step; a second one interrupts it at once.
    """

    def __init__(self, notice: Callable[[], None] = lambda: None) -> None:
        super().__init__(notice, patient=True, raises=False)

    def stepped(self, report: StepReport) -> None:
        pass

    def evaluated(self, step: int, loss: float) -> None:
        pass

    def wants_state(self, step: int) -> bool:
        return False

    def keep(self, state: TrainingState) -> None:
        pass

    def wants_to_stop(self) -> bool:
        return self.number is not None


class Keeper(Bystander):
    """The observer in the first process."""

    def __init__(self, run: RunFolder, recipe: Recipe, watcher: TrainProgress, save_every: int | None,
                 state: TrainingState | None) -> None:  # fmt: skip
        super().__init__(watcher.stopping)
        self._run, self._recipe, self._watcher, self._save_every = run, recipe.to_json(), watcher, save_every
        self._log = Log(run.log, int(state.facts[LOG_SIZE]) if state else 0)
        self._kept_at = time.monotonic()
        self._ranks = _last_ranks(run.log)
        if state is None:
            self._log.write({"recipe": self._recipe, "versions": _versions()})

    def __enter__(self) -> Self:
        super().__enter__()
        self._log.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.__exit__(kind, error, trace)
        super().__exit__(kind, error, trace)

    def stepped(self, report: StepReport) -> None:
        entry = report.to_json()
        if entry.get("ranks") == self._ranks:  # AdaLoRA's ranks of every module are written only when they change
            entry.pop("ranks", None)
        else:
            self._ranks = entry.get("ranks")
        self._log.write(entry)
        self._watcher.stepped(report)

    def evaluated(self, step: int, loss: float) -> None:
        self._log.write({"step": step, "validation_loss": loss})
        self._watcher.evaluated(step, loss)

    def wants_state(self, step: int) -> bool:
        if self._save_every is not None:
            return step % self._save_every == 0
        return time.monotonic() - self._kept_at >= SECONDS_BETWEEN_STATES

    def keep(self, state: TrainingState) -> None:
        facts = {**state.facts, LOG_SIZE: self._log.synced()}
        self._run.keep(replace(state, facts=facts), self._recipe)
        self._kept_at = time.monotonic()


def _last_ranks(log: Path) -> Mapping[str, int] | None:
    """Return the last ranks in a log, so that a resumed run writes them only when they change."""
    last = None
    for entry in read_log(log):
        last = entry.get("ranks", last)
    return last


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("loratool", "torch", "transformers", "bitsandbytes")
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}
