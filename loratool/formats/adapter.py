"""An adapter in memory, independent of its file format."""

from __future__ import annotations

import hashlib
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.architecture import module_of
from loratool.checkpoint.file_state import FileState
from loratool.checkpoint.header import TensorInfo
from loratool.formats.kinds import kind_named
from loratool.formats.module_targets import ModuleTargets
from loratool.updates import Ranked, Update
from loratool.updates.replacement import WHOLE


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout other than PEFT's: the format's word and title (`formats.table`), and the metadata of the file."""

    format: str
    title: str
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter: an update for each parameter that it changes, and its recorded facts.

    Attributes:
        name: the default name: that of its folder or file.
        file: the safetensors file with its tensors.
        sha256: the hash of that file, which is the adapter's fingerprint.
        kind: the word for its kind (`formats.kinds`).
        changes: the update of each parameter, by the name that the adapter uses (``...q_proj.weight``).
        config: its PEFT configuration, as JSON.
        settings: the checked configuration: targets, and what the kind adds.
        facts: what loratool recorded beside it (kind, base fingerprint, lineage, recipe); may be empty.
        notes: what a user should know about how it was read.
        layout: its file's layout, if loratool writes that layout; None for PEFT's layout.
        whole: the modules that its configuration lists as whole (``modules_to_save``).
        own_base: the base's parameters that its file holds beside an update of them (PEFT's ``base_layer``). On loading, PEFT
            replaces the base's by them before it applies the updates.
        states: states of its files when they were opened; empty for an adapter made in memory.
    """

    name: str
    file: Path
    sha256: str
    kind: str
    changes: Mapping[str, Update]
    config: Mapping[str, Any]
    settings: ModuleTargets
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    layout: Layout | None = None
    whole: tuple[str, ...] = ()
    own_base: Mapping[str, TensorInfo] = field(default_factory=dict)
    states: tuple[FileState, ...] = ()

    @property
    def ranked(self) -> dict[str, Ranked]:
        """The updates that have a rank, by module."""
        return {module_of(name): each for name, each in self.changes.items() if isinstance(each, Ranked)}

    @property
    def replacements(self) -> dict[str, Update]:
        """The updates that replace whole parameters (``modules_to_save``)."""
        return {name: update for name, update in self.changes.items() if update.replaces}

    @property
    def rank(self) -> int | None:
        """The largest rank of any module; None if no module has one."""
        return max((update.rank for update in self.ranked.values()), default=None)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each module that has one."""
        return {module: update.rank for module, update in sorted(self.ranked.items())}

    @property
    def alpha(self) -> float | None:
        """Alpha of the configuration; None if it has none. A kind that has no alpha does not check what is there."""
        stated: Any = self.config.get(kind_named(self.kind).alpha_key)
        return float(stated) if type(stated) in (int, float) and abs(stated) <= sys.float_info.max else None

    @property
    def scaling(self) -> float | dict[str, float] | None:
        """The scaling of its products: one number, or one for each module if they differ."""
        scalings = {module: update.scaling for module, update in sorted(self.ranked.items())}
        if not scalings:
            return None
        return next(iter(scalings.values())) if len(set(scalings.values())) == 1 else scalings

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that its method changes, without those that it holds whole beside them, in the order of `changes`."""
        return tuple(dict.fromkeys(module_of(name) for name, update in self.changes.items() if update.kind != WHOLE))

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The distinct targets of its modules (`target_of`), sorted: ``("q_proj", "v_proj")``."""
        return tuple(sorted({target_of(module) for module in self.modules}))

    @property
    def dtype(self) -> str:
        """The dtype of its factors in safetensors' spelling, or ``mixed``."""
        updates = [update for update in self.changes.values() if update.kind != WHOLE]
        dtypes = {info.dtype for update in updates for info in self._numbers(update)}
        return dtypes.pop() if len(dtypes) == 1 else "mixed"

    @property
    def parameter_count(self) -> int:
        """The count of numbers in all its tensors."""
        return sum(math.prod(info.shape) for info in self.tensors)

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The locations of its tensors, each once."""
        updates = (info for update in self.changes.values() for info in update.tensors.values())
        return tuple(dict.fromkeys((*updates, *self.own_base.values())))

    @property
    def factors(self) -> tuple[TensorInfo, ...]:
        """The locations of its tensors that hold floating-point numbers, not indices."""
        return tuple(info for update in self.changes.values() for info in self._numbers(update))

    def _numbers(self, update: Update) -> Iterator[TensorInfo]:
        indices = kind_named(self.kind).indices
        return (info for letter, info in update.tensors.items() if letter not in indices)

    @property
    def base_model(self) -> str | None:
        """The base's Hub id or path recorded in the configuration, or None."""
        recorded = self.config.get("base_model_name_or_path")
        return recorded if isinstance(recorded, str) and recorded else None

    @property
    def base_fingerprint(self) -> str | None:
        """The fingerprint of the base that it was trained on, if recorded."""
        recorded = self.facts.get("base_fingerprint")
        return recorded if isinstance(recorded, str) and recorded else None


def of_weights(updates: Mapping[str, Update]) -> dict[str, Update]:
    """Turn updates by module name into changes by parameter name (the modules' weights)."""
    return {f"{module}.weight": update for module, update in updates.items()}


def path_of(module: str) -> tuple[str, ...]:
    """Return the components of a module's name: ``("model", "layers", "0", "self_attn", "q_proj")``.

    A kohya name, which has ``_`` for every dot, is split only at the numbers inside it:
    ``("lora_te_text_model_encoder_layers", "0", "self_attn_q_proj")``.
    """
    if "." in module or not module.startswith(("lora_", "lycoris_")):
        return tuple(module.split("."))
    before = re.sub(r"_(\d+)(?=_)", r".\1", module)
    return tuple(re.sub(r"(\.\d+)_", r"\1.", before).split("."))


def target_of(module: str) -> str:
    """Return a module's target as configurations name it: its last component, after the previous one if the last is a number."""
    path = path_of(module)
    return ".".join(path[-2:]) if path[-1].isdecimal() else path[-1]


def sha256_of(file: Path) -> str:
    """Return the sha256 of a file, 64 hexadecimal digits: an adapter's fingerprint and the Hub's LFS id."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
