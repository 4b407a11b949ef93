"""The state of a run between two steps, as one safetensors file, from which the run resumes bit for bit.

The file holds the trainable parameters, the optimizer's state, the method's buffers and the best parameters so far. Its
metadata hold the step and the recipe as JSON. No random state is kept: every step draws from a seed that is made of the
recipe's seed and the step's number. A new file replaces the old one by a rename, so there is always a complete one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratool.checkpoint.header import header_bytes, read_header
from loratool.checkpoint.json_text import parse_json
from loratool.checkpoint.output_kind import OutputKind
from loratool.checkpoint.staging import staged_file
from loratool.errors import CheckpointError, LoratoolError, quoted

if TYPE_CHECKING:
    import torch

STATE_KEY: Final = "loratool-training"
SCHEMA: Final = 1


@dataclass(frozen=True, slots=True)
class TrainingState:
    """The state of a run after `step` steps.

    Attributes:
        step: the number of steps done.
        parameters: trainable parameters by name.
        moments: the optimizer's state of each parameter.
        buffers: the method's buffers.
        best: parameters and buffers with the lowest validation loss, named ``parameter NAME`` and ``buffer NAME``; may be
            empty.
        facts: figures that accumulate over the run, such as the losses on the validation samples.
    """

    step: int
    parameters: Mapping[str, torch.Tensor]
    moments: Mapping[str, Mapping[str, torch.Tensor]]
    buffers: Mapping[str, torch.Tensor]
    best: Mapping[str, torch.Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def save_state(state: TrainingState, recipe: Mapping[str, Any], file: Path) -> None:
    """Write a state as `file`. An older file is replaced only once the new one is durable.

    Raises:
        OutputError: the state cannot be written; an older file is still there.
    """
    import torch

    groups = {
        "parameters": state.parameters,
        "buffers": state.buffers,
        "best": state.best,
        **{f"moments.{name}": tensors for name, tensors in state.moments.items()},
    }
    tensors = {
        f"{group} {name}": tensor.detach().cpu().contiguous()
        for group, found in groups.items()
        for name, tensor in found.items()
    }
    shapes = {name: (_DTYPES[str(tensor.dtype)], tuple(tensor.shape)) for name, tensor in tensors.items()}
    record = {"schema": SCHEMA, "step": state.step, "facts": state.facts, "recipe": recipe}
    with staged_file(file, OutputKind.OWN_RECORD, force=True) as stage, open(stage, "wb") as stream:
        stream.write(header_bytes(shapes, {STATE_KEY: json.dumps(record, sort_keys=True)}))
        for tensor in tensors.values():
            content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
            stream.write(memoryview(content))


def read_recipe(file: Path) -> tuple[int, dict[str, Any]]:
    """Return the step and the recipe of a saved state, without reading its tensors.

    Raises:
        CheckpointError: `file` is not the state of a training run.
    """
    record = _record(file)
    return record["step"], record["recipe"]


def load_state(file: Path) -> TrainingState:
    """Read a saved state.

    Raises:
        CheckpointError: `file` is not the state of a training run.
    """
    from safetensors.torch import load_file

    record = _record(file)
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(file).items():
        group, _, name = key.partition(" ")
        groups.setdefault(group, {})[name] = tensor
    return TrainingState(
        step=record["step"],
        parameters=groups.pop("parameters", {}),
        buffers=groups.pop("buffers", {}),
        best=groups.pop("best", {}),
        moments={group.removeprefix("moments."): found for group, found in groups.items()},
        facts=record["facts"],
    )


_DTYPES: Final = {
    "torch.float32": "F32",
    "torch.float64": "F64",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


def _record(file: Path) -> dict[str, Any]:
    try:
        record = parse_json(read_header(file).metadata[STATE_KEY].encode())
        whole = record["schema"] == SCHEMA and isinstance(record["step"], int) and isinstance(record["recipe"], dict)
    except (LoratoolError, KeyError, ValueError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(f"{quoted(file)} is not the state of a training run; remove its folder and train again")
    found: dict[str, Any] = record
    return found
