"""Outputs of a training run: the adapter, the log and the picture beside it, and the entry in the catalogue."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratool.checkpoint.output_kind import OutputKind
from loratool.checkpoint.staging import refuse_existing, staged_file
from loratool.errors import LoratoolError
from loratool.formats.adapter_draft import Draft
from loratool.formats.adapter_names import SINGLE_FILE_SUFFIXES
from loratool.formats.write import adapter_output
from loratool.library.places.training_run import RunFolder
from loratool.library.recording.derive import Child, bring_up, scratch_folder
from loratool.library.training_runs.inputs import TrainingInputs
from loratool.library.training_runs.picture import draw_training
from registry import AdapterRecord, Registry, RegistryError

if TYPE_CHECKING:
    from loratool.training.loop import Outcome, Training

LOG_SUFFIX: Final = ".train.jsonl"
PICTURE_SUFFIX: Final = ".train.png"


@dataclass(frozen=True, slots=True)
class TrainingOutput:
    """Paths of the adapter, and of the log and the picture beside it. `force` allows replacing existing ones."""

    adapter: Path
    force: bool

    @property
    def log(self) -> Path:
        """``pirate.train.jsonl`` beside ``pirate.safetensors``, or beside the folder ``pirate``."""
        return self._beside(LOG_SUFFIX)

    @property
    def picture(self) -> Path:
        """``pirate.train.png``, beside the same."""
        return self._beside(PICTURE_SUFFIX)

    def _beside(self, suffix: str) -> Path:
        is_file = self.adapter.suffix in SINGLE_FILE_SUFFIXES
        return self.adapter.with_name((self.adapter.stem if is_file else self.adapter.name) + suffix)

    def refuse_existing(self) -> None:
        """Raise OutputError before long work if an output exists and must not be replaced, or cannot be written."""
        refuse_existing(self.adapter, adapter_output(self.adapter), force=self.force)
        refuse_existing(self.log, OutputKind.TRAINING_LOG, force=self.force)
        refuse_existing(self.picture, OutputKind.PICTURE, force=self.force)
        with Draft(scratch_folder(self.adapter)):
            pass


@dataclass(frozen=True, slots=True)
class Published:
    """The published result. `picture` is None if it could not be drawn."""

    record: AdapterRecord
    picture: Path | None
    notes: tuple[str, ...]


def publish(training: Training, outcome: Outcome, inputs: TrainingInputs, run: RunFolder, output: TrainingOutput,
            catalogue: Registry) -> Published:  # fmt: skip
    """Write and catalogue the result of a run.

    Raises:
        LoratoolError: it cannot be written or catalogued. The run's state is kept, so that this can be tried again.
    """
    try:
        record, notes = _catalogued(training, outcome, inputs, run, output, catalogue)
        with staged_file(output.log, OutputKind.TRAINING_LOG, force=output.force) as stage:
            shutil.copyfile(run.log, stage)
    except (LoratoolError, RegistryError) as error:
        raise LoratoolError(f"the adapter is trained, but {error}; then type {run.how_to_go_on}") from None
    title = f"{record.reference}: {inputs.recipe.adapter.method} on {inputs.recipe.base}"
    try:
        draw_training(run.log, output.picture, title, loss_by_rank=outcome.loss_by_rank, force=output.force)
    except LoratoolError as error:
        return Published(record, None, (*notes, f"no picture was drawn: {error}"))
    return Published(record, output.picture, notes)


def _catalogued(training: Training, outcome: Outcome, inputs: TrainingInputs, run: RunFolder, output: TrainingOutput,
                catalogue: Registry) -> tuple[AdapterRecord, tuple[str, ...]]:  # fmt: skip
    """Write the adapter and catalogue it. Facts that differ between equal runs are only in the catalogue, not in the file."""
    recipe = inputs.recipe
    facts: Mapping[str, Any] = {
        "schema": 1,
        "kind": recipe.adapter.method,
        "base_fingerprint": recipe.base_fingerprint,
        "recipe": recipe.to_json(),
        "metrics": outcome.losses(),
    }
    config = {"base_model_name_or_path": inputs.hub_id_or_name}
    base = inputs.base.record.name if inputs.base.record else None
    with Draft(scratch_folder(output.adapter)) as draft:
        drafted = training.adaptation.adapter(draft, run.name, config, facts)
        child = Child(drafted, output.adapter, run.name, {})
        (added,) = bring_up([child], catalogue, "train", (), base=base, force=output.force)
    if not added.record.is_catalogued:
        return replace(added.record, metrics=outcome.to_json()), added.notes
    with catalogue.for_writing() as writable:
        record = writable.adapters.update(added.record.reference, metrics=outcome.to_json())
    return record, added.notes
