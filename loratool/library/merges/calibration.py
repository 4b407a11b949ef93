"""Merges calibrated by the inputs of their matrices on a user's text: `loratool merge --calibrate`."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loratool.checkpoint.fingerprint import file_digest
from loratool.checkpoint.model import Checkpoint
from loratool.errors import CheckpointError, LoratoolError, UnsupportedError, quoted
from loratool.library.places.user_path import user_path
from loratool.library.reporting.progress import Progress
from loratool.merging.arithmetic import choose_device
from loratool.merging.plan import MergePlan, Target

if TYPE_CHECKING:
    from loratool.running.data import Data

SUFFIX: Final = ".weight"


def calibration_text(file: str | os.PathLike[str] | None, *, is_converted: bool) -> Data | None:
    """Return the content of the calibration file; None if no file is given.

    `is_converted` is whether the output is stored differently than the base.

    Raises:
        LoratoolError: this kind of merge cannot be calibrated.
        DataError, NotFoundError: the file cannot be read, or holds no samples.
    """
    if file is None:
        return None
    if is_converted:
        raise LoratoolError(
            "--calibrate is for merges into quantized weights as they are stored; leave out --quantize, --base-as and "
            "--dequantize, or leave out --calibrate"
        )
    from loratool.running.data import read_data

    return read_data(user_path(file))


@contextmanager
def calibrated(plan: MergePlan, text: Data | None, device: str, watcher: Progress) -> Iterator[MergePlan]:
    """Yield the plan with the inputs of its quantized matrices on `text`, or unchanged if there is no text.

    The inputs are in temporary files, which are removed at the end of the block.

    Raises:
        UnsupportedError: the plan changes no quantized weights.
        LoratoolError: transformers cannot run the model, or the text does not fit it.
    """
    if text is None:
        yield plan
        return
    modules = [target.name.removesuffix(SUFFIX) for target in plan.targets if target.weight.is_calibrated]
    if not modules:
        raise UnsupportedError(
            f"{quoted(plan.base.path)} has no quantized weights where the adapter lands, and dense weights need no calibration; "
            "leave out --calibrate"
        )
    from loratool.running.calibration import MOST_TOKENS, calibration_samples, record_inputs
    from loratool.running.model import context_length, load_config, load_model, load_tokenizer, quiet_libraries

    folder, place = _folder(plan.base), choose_device(device)
    with tempfile.TemporaryDirectory(prefix="loratool-") as scratch:
        with quiet_libraries():
            config = load_config(folder)
            samples = calibration_samples(
                text, load_tokenizer(folder), min(context_length(config) or MOST_TOKENS, MOST_TOKENS)
            )
            watcher.begin("calibrating", len(modules))
            files = record_inputs(
                load_model(folder, config, place),
                modules,
                samples,
                Path(scratch),
                device=place,
                progress=watcher.advance,
            )
        gc.collect()  # the model is in reference cycles, and keeps its files open
        targets = tuple(_with_inputs(target, files) for target in plan.targets)
        yield replace(plan, targets=targets, calibration=file_digest(text.file))


def _with_inputs(target: Target, files: dict[str, Path]) -> Target:
    return replace(target, inputs=files.get(target.name.removesuffix(SUFFIX)))


def _folder(base: Checkpoint) -> Path:
    if not base.path.is_dir():
        raise CheckpointError(
            f"{quoted(base.path)} is a single file, and a calibration runs the model; give the model's folder, with its "
            "tokenizer"
        )
    return base.path
