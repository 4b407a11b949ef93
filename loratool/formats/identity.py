"""The identity of an adapter of any kind and format, whether or not loratool computes it."""

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
    """The identity of one adapter.

    Attributes:
        name: its folder's or file's name.
        files: its files, parsed.
        sha256: its fingerprint.
        format: the word for its format (`formats.table`).
        kind: the word for its kind (`formats.kinds`).
        adapter: the adapter itself if loratool computes it, else None.
        why_not: why loratool does not compute it, and what to do; None if it does.
        ranks: the rank of each module, where known.
        alpha: the alpha stated for most modules.
        scaling: the factor of the update: one number, or one for each module.
        modules: the modules that it changes.
        config: its configuration, as JSON.
        facts: what loratool recorded beside it.
        base_model: the stated Hub id, path or name of its base.
        family: the model family that it is for, as its trainer names it.
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
        """The states of its files when they were opened."""
        return self.files.states

    @property
    def rank(self) -> int | None:
        """The largest rank of any module."""
        return max(self.ranks.values(), default=None)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The distinct targets of its modules, as a configuration names them, sorted."""
        return tuple(sorted({target_of(module) for module in self.modules}))

    @property
    def dtype(self) -> str:
        """The dtype of its tensors in its file's spelling, or ``mixed`` for several dtypes; alphas do not count."""
        if self.adapter is not None:
            return self.adapter.dtype
        dtypes = {info.dtype for info in self.files.tensors.values() if math.prod(info.shape) > 1}
        return dtypes.pop() if len(dtypes) == 1 else "mixed"

    @property
    def parameter_count(self) -> int:
        """The count of numbers in its tensors."""
        if self.adapter is not None:
            return self.adapter.parameter_count
        return sum(math.prod(info.shape) for info in self.files.tensors.values())

    @property
    def tensor_count(self) -> int:
        """The number of tensors in its files."""
        return len(self.files.tensors)

    @property
    def base_fingerprint(self) -> str | None:
        """The fingerprint of the base that it was trained on, if recorded."""
        recorded = self.facts.get("base_fingerprint")
        return recorded if isinstance(recorded, str) and recorded else None


AnyAdapter = Adapter | Identity
"""An adapter, or its identity if loratool does not compute it."""
