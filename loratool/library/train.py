"""`loratool.train`: train an adapter on a user's own samples, and catalogue it with its base, recipe and loss."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from loratool.errors import LoratoolError, quoted
from loratool.formats.read import read_adapter
from loratool.interrupts import Interrupted
from loratool.library.places.holding import hold
from loratool.library.places.output_place import refuse_overlap
from loratool.library.places.training_run import Held, RunFolder, run_folder
from loratool.library.places.user_path import exists, user_path
from loratool.library.recording.new_adapter import facts_of
from loratool.library.recording.opening import open_registry
from loratool.library.reporting.adapter_json import adapter_json
from loratool.library.training_runs.inputs import TrainingInputs, prepare, read_inputs
from loratool.library.training_runs.keeper import Bystander, Keeper
from loratool.library.training_runs.output import Published, TrainingOutput, publish
from loratool.library.training_runs.progress import SilentTraining, TrainProgress
from loratool.running.model import quiet_libraries
from loratool.training.processes import is_first
from loratool.training.recipe import Choices, Recipe, checked, differences, flag
from registry import AdapterRecord, Registry, check_name, uncatalogued

if TYPE_CHECKING:
    from loratool.training.checkpoints import TrainingState
    from loratool.training.loop import Outcome, Training

PathLike = str | os.PathLike[str]


class TrainingStopped(Interrupted):
    """A run was interrupted and its state is kept. The message says how to continue."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A trained adapter.

    Attributes:
        out: its file or folder.
        log: the log of the run beside it, one JSON object per line.
        plot: the picture of the run beside it; None if it could not be drawn.
        record: its entry in the catalogue.
        base: reference to its base that is valid in any folder: a catalogued name, or an absolute path.
        recipe: all choices that decide the result.
        outcome: losses before and after, and figures of the run.
        notes: notes for the user.
    """

    out: Path
    log: Path
    plot: Path | None
    record: AdapterRecord
    base: str
    recipe: Recipe
    outcome: Outcome
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        return {
            "out": str(self.out),
            "log": str(self.log),
            "plot": None if self.plot is None else str(self.plot),
            **adapter_json(self.record),
            **self.outcome.to_json(),
            "notes": list(self.notes),
        }


def train(base: PathLike | None = None, data: PathLike | None = None, *, name: str, out: PathLike | None = None,
          resume: bool = False, force: bool = False, save_every: int | None = None, device: str | None = None,
          registry: str | None = None, progress: TrainProgress | None = None,
          **choices: Unpack[Choices]) -> TrainResult:  # fmt: skip
    """Train an adapter, write it, and catalogue it with its base's fingerprint, its recipe and its loss.

    During training, its state is kept in ``runs/<name>`` in the home folder, or beside the output if the home cannot be
    written. With `resume`, an interrupted or killed run continues from there. On a CPU, the result has the same bytes as that
    of an uninterrupted run.

    Args:
        base: a catalogued name, a folder, or a Hub id; dense, or NF4 as bitsandbytes stores it. With `resume`, this and all
            other choices may be left out; they stay as they were.
        data: the samples; see `loratool.running.data`.
        name: name of the adapter in the catalogue.
        out: its file (``.safetensors``, ``.st``) or folder; by default ``<name>.safetensors`` in the working folder.
        resume: continue the run of that name.
        force: start again if a run of that name is not finished, replace an output that loratool wrote, and make the next
            version if the name is in the catalogue.
        save_every: number of steps between kept states; by default one state is kept per minute.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.
        progress: receives a report of each step.
        choices: choices that decide the result; see `loratool.training.recipe.Choices`.

    Raises:
        LoratoolError, registry.RegistryError: the message says what is wrong; nothing is catalogued.
        TrainingStopped: it was interrupted; the message says how to continue.
    """
    check_name(name, "adapter")
    watcher: TrainProgress = progress or SilentTraining()
    run = run_folder(name, user_path(out) if out else None)
    with open_registry(registry, read_only=True) as catalogue, Held(run) if is_first() else nullcontext():
        request = _request(run, base, data, out, device, choices, resume=resume, force=force)
        output = TrainingOutput(user_path(request["out"]), request["force"])
        if not resume:
            _refuse_taken(run, catalogue, force=force)
        inputs = read_inputs(
            request["base"], request["data"], request["choices"], request["device"], catalogue, watcher
        )
        if not resume:
            output.refuse_existing()
        refuse_overlap(output.adapter, [inputs.base.path])
        state = _state_to_go_on_from(run, inputs.recipe) if resume else None
        with hold(inputs.base.path, exclusive=False), _collecting_garbage(), quiet_libraries():
            training = prepare(inputs, watcher)
            if state is not None:
                training.load(state)
            elif is_first():
                run.begin(request | {"base": inputs.reference})
            outcome, published = _outcome(training, run, watcher, state, save_every), None
            if is_first():
                run.record(run.recorded() | {"force": True})  # from here on, the output may be this run's own
                published = publish(training, outcome, inputs, run, replace(output, force=True), catalogue)
                run.remove()
            training.processes.wait()
        return _result(name, output, inputs, outcome, published, registry)


def _result(name: str, output: TrainingOutput, inputs: TrainingInputs, outcome: Outcome, published: Published | None,
            registry: str | None) -> TrainResult:  # fmt: skip
    """Return the result; in a process that is not the first, which publishes, with the entry that the first has made."""
    if published is not None:
        record, picture, notes = published.record, published.picture, published.notes
    else:
        with open_registry(registry, read_only=True) as written:  # the first process may have created the catalogue
            record, picture, notes = _as_published(name, output.adapter, written), None, ()
    return TrainResult(
        output.adapter,
        output.log,
        picture,
        record,
        inputs.reference,
        inputs.recipe,
        outcome,
        (*inputs.notes, *notes),
    )


def _as_published(name: str, out: Path, catalogue: Registry) -> AdapterRecord:
    """Return the entry that the first process made, or an uncatalogued one from its output if it made none."""
    versions = catalogue.adapters.versions(name)
    return versions[-1] if versions else uncatalogued(name, facts_of(read_adapter(out), catalogue)[0])


def _request(run: RunFolder, base: PathLike | None, data: PathLike | None, out: PathLike | None, device: str | None,
             choices: Mapping[str, Any], *, resume: bool, force: bool) -> dict[str, Any]:  # fmt: skip
    """Return the request; with `resume` that of the run's start, overridden by what is given now.

    Raises:
        LoratoolError: something is missing, or there is no run to continue.
    """
    chosen = {key: value for key, value in choices.items() if value is not None}
    places = {"base": base, "data": data, "out": out}
    named = {key: _absolute(os.fspath(value)) for key, value in places.items() if value is not None}
    if not resume:
        for key in ("base", "data"):
            if not named.get(key):
                raise LoratoolError(f"--{key} is missing; say what to train {'on' if key == 'base' else 'with'}")
        out_by_default = {"out": os.path.abspath(f"{run.name}.safetensors")}
        return out_by_default | named | {"choices": checked(chosen), "device": device or "auto", "force": force}
    if run.kept_step() is None:
        raise LoratoolError(f"there is no run {quoted(run.name)} to go on with; leave --resume out")
    before = run.recorded()
    length = ("steps", "epochs") if {"steps", "epochs"} & chosen.keys() else ()
    chosen = {key: value for key, value in before["choices"].items() if key not in length} | chosen
    said = {"choices": checked(chosen), "device": device or before["device"], "force": force or before["force"]}
    return before | named | said


def _absolute(text: str) -> str:
    """Return an existing path as an absolute one, and any other name unchanged."""
    path = user_path(text)
    return os.path.abspath(path) if exists(path) else text


def _refuse_taken(run: RunFolder, catalogue: Registry, *, force: bool) -> None:
    """Raise LoratoolError if the name belongs to an unfinished run or to an adapter."""
    if force:
        return
    step = run.kept_step()
    if step is not None:
        raise LoratoolError(
            f"a run {quoted(run.name)} is not finished (step {step:,} is kept); go on with {run.how_to_go_on}, or begin "
            "anew with --force"
        )
    versions = catalogue.adapters.versions(run.name)
    if versions:
        raise LoratoolError(
            f"there is an adapter {quoted(versions[-1].reference)} already; give another --name, or --force for its next "
            "version"
        )


def _state_to_go_on_from(run: RunFolder, recipe: Recipe) -> TrainingState:
    """Return the kept state of a run with this recipe.

    Raises:
        LoratoolError: the run had another recipe.
    """
    state, recorded = run.load()
    differing = differences(recorded, recipe.to_json())
    if differing:
        changes = ", ".join(_change(key, recorded) for key in differing)
        raise LoratoolError(
            f"the run {quoted(run.name)} started with other choices: {changes}; continue with those, or start again with --force"
        )
    return state


def _change(key: str, recorded: dict[str, Any]) -> str:
    if key in ("base", "data"):
        return f"--{key} was {quoted(recorded.get(key))} with other content"
    return f"{flag(key)} was {quoted(recorded.get(key), 40)}"


def _outcome(training: Training, run: RunFolder, watcher: TrainProgress, state: TrainingState | None,
             save_every: int | None) -> Outcome:  # fmt: skip
    """Train to the end, and return the outcome.

    Raises:
        TrainingStopped: it was interrupted, and its state is kept.
    """
    recipe = training.recipe
    watcher.begin_steps(training.step, recipe.steps)
    with Keeper(run, recipe, watcher, save_every, state) if is_first() else Bystander() as observer:
        finished = training.run(observer)
    alone = training.processes.count == 1  # other processes may not have received the signal yet
    if not finished or (alone and observer.number is not None):
        raise TrainingStopped(
            observer.number or signal.SIGINT,
            f"Stopped after step {training.step:,} of {recipe.steps:,}; its state is kept. Go on with {run.how_to_go_on}",
        )
    watcher.begin("measuring the ranks", training.scored_at_the_end)
    return training.outcome(watcher.advance)


@contextmanager
def _collecting_garbage() -> Iterator[None]:
    """Turn garbage collection on, which the command line turns off: training makes garbage at every step."""
    was_enabled = gc.isenabled()
    gc.enable()
    try:
        yield
    finally:
        if not was_enabled:
            gc.disable()
