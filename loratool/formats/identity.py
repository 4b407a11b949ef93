"""What is told of an adapter, whatever its kind and format, whether loratool computes it or not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.checkpoint.file_state import FileState
from loratool.formats.adapter import Adapter, target_of
from loratool.formats.adapter_files import AdapterFiles


@dataclass(frozen=True, slots=True)
class Identity:
    """What is told of one adapter.

    Attributes:
        name: its folder's or file's name.
        files: its files, parsed.
        sha256: its fingerprint.
        format: the word for its format (`formats.table`).
        kind: the word for its kind (`formats.kinds`).
        adapter: the adapter itself, where loratool computes it; else None.
        why_not: why loratool does not compute it, with the way out; None where it does.
        ranks: the rank of each module of which it is told.
        alpha: what is stated for most modules.
        scaling: what multiplies the update: one number, or that of each module.
        modules: the modules that it changes.
        config: its configuration, as JSON.
        facts: what loratool recorded beside it.
        base_model: its base's Hub id, path or name, as it is stated.
        family: the family of models that it is for, in its trainer's word.
        notes: what a user should know about how it was read.
    """

    name: str
    files: AdapterFiles
    sha256: str
    format: str
    kind: str
    adapter: Adapter | None
    why_not: str | None
    ranks: Mapping[str, int]
    alpha: float | None
    scaling: float | Mapping[str, float] | None
    modules: tuple[str, ...]
    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    base_model: str | None
    family: str | None
    notes: tuple[str, ...]

    @property
    def file(self) -> Path:
        """The file with its tensors, or the index of several."""
        return self.files.file

    @property
    def states(self) -> tuple[FileState, ...]:
        """The states of its files, when they were opened."""
        return self.files.states

    @property
    def rank(self) -> int | None:
        """The largest rank of any module."""
        return max(self.ranks.values(), default=None)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """What a configuration would call the modules, once each, sorted."""
        return tuple(sorted({target_of(module) for module in self.modules}))

    @property
    def dtype(self) -> str:
        """The dtype of its tensors as its file spells it, or ``mixed`` where they have several; alphas do not count."""
        if self.adapter is not None:
            return self.adapter.dtype
        dtypes = {info.dtype for info in self.files.tensors.values() if math.prod(info.shape) > 1}
        return dtypes.pop() if len(dtypes) == 1 else "mixed"

    @property
    def parameter_count(self) -> int:
        """Numbers in its tensors."""
        if self.adapter is not None:
            return self.adapter.parameter_count
        return sum(math.prod(info.shape) for info in self.files.tensors.values())

    @property
    def tensor_count(self) -> int:
        """How many tensors its files hold."""
        return len(self.files.tensors)

    @property
    def base_fingerprint(self) -> str | None:
        """The fingerprint of the base that it was trained on, where it is recorded."""
        recorded = self.facts.get("base_fingerprint")
        return recorded if isinstance(recorded, str) and recorded else None


AnyAdapter = Adapter | Identity
"""An adapter, or where loratool does not compute it, what is told of it."""
