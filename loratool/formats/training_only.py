"""What a LoRA's file may hold of its training: tensors and settings that PEFT ignores when it merges.

The adapter is a plain LoRA without them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from loratool.errors import quoted
from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.tensor_keys import split_peft


@dataclass(frozen=True, slots=True)
class TrainingOnly:
    """One way to train a LoRA.

    Attributes:
        title: its name for people.
        setting: the key of PEFT's configuration.
        part: the beginning of its tensors' names after the module's name.
    """

    title: str
    setting: str
    part: str


WAYS: Final = (
    # Ahmad et al. 2024, arXiv:2405.17991: projections that compress the activations kept for the backward pass.
    TrainingOnly("VeLoRA", "velora_config", "lora_velora_"),
    # The sampler of perturbations that are added to the factors in training.
    TrainingOnly("MonteCLoRA", "monteclora_config", "lora_monteclora_"),
)


def without_training(files: AdapterFiles) -> tuple[AdapterFiles, tuple[str, ...]]:
    """Return the files without what serves training alone, and a note for each way of training."""
    notes: list[str] = []
    tensors, config = dict(files.tensors), dict(files.config)
    for way in WAYS:
        own = [name for name in tensors if _belongs(name, way)]
        for name in own:
            del tensors[name]
        if config.get(way.setting) or own:
            config.pop(way.setting, None)
            ignored = f", of which {len(own)} tensors ({quoted(own[0])}, ...) were ignored" if own else ""
            notes.append(f"it was trained by {way.title}{ignored}; it is merged as a LoRA, as PEFT does")
    return replace(files, tensors=tensors, config=config), tuple(notes)


def _belongs(name: str, way: TrainingOnly) -> bool:
    where = split_peft(name)
    return where is not None and where[1].startswith(way.part)
