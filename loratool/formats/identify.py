"""What an adapter is, whatever its kind and format: what the catalogue keeps of it. Nothing is computed; no torch is imported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.errors import UnsupportedError
from loratool.formats.adapter import Adapter, target_of
from loratool.formats.adapter_files import AdapterFiles, open_adapter
from loratool.formats.adapter_format import AdapterFormat, Description
from loratool.formats.alpha import Alpha
from loratool.formats.bare import described_alpha
from loratool.formats.finite import refuse_not_finite, refuse_numbers_not_finite
from loratool.formats.read import read_files
from loratool.formats.table import format_of


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


def identify(path: Path, alpha: Alpha | None = None) -> Identity:
    """Tell what the adapter at `path` is, and read it where loratool can.

    Args:
        path: of its folder or file.
        alpha: for a file that does not state its own.

    Raises:
        NotFoundError: nothing is there.
        AdapterError: it is no adapter that can be told, is damaged, or a pickle; or it could be read and states no alpha.
    """
    return identify_files(open_adapter(path), alpha)


def identify_files(files: AdapterFiles, alpha: Alpha | None = None) -> Identity:
    """The same for files that were opened."""
    found = format_of(files)
    try:
        adapter = read_files(files, alpha)
    except UnsupportedError as error:
        return _described(files, found, found.describe(files), str(error))
    return _read(files, found, found.describe(files), adapter)


def refuse_broken_numbers(found: Identity) -> None:
    """Raise AdapterError if the adapter's tensors hold NaN or infinity."""
    if found.adapter is not None:
        refuse_not_finite(found.adapter)
    else:
        refuse_numbers_not_finite(found.files.tensors.values())


def _described(files: AdapterFiles, found: AdapterFormat, said: Description, why_not: str) -> Identity:
    return Identity(
        name=files.name,
        files=files,
        sha256=files.sha256(),
        format=found.name,
        kind=said.kind,
        adapter=None,
        why_not=why_not,
        ranks=dict(sorted(said.ranks.items())),
        alpha=said.alpha if said.alpha is not None else described_alpha(files, said.ranks),
        scaling=said.scaling,
        modules=said.modules,
        config=files.config,
        facts=files.facts,
        base_model=said.base_model,
        family=said.family,
        notes=said.notes,
    )


def _read(files: AdapterFiles, found: AdapterFormat, said: Description, adapter: Adapter) -> Identity:
    return Identity(
        name=adapter.name,
        files=files,
        sha256=adapter.sha256,
        format=found.name,
        kind=adapter.kind,
        adapter=adapter,
        why_not=None,
        ranks=adapter.ranks,
        alpha=adapter.alpha,
        scaling=adapter.scaling,
        modules=adapter.modules,
        config=adapter.config,
        facts=adapter.facts,
        base_model=adapter.base_model or said.base_model,
        family=said.family,
        notes=adapter.notes,
    )
