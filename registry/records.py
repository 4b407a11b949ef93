"""The catalogue's facts as plain frozen data. Field names are the database's column names and the JSON keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

LocationKind = Literal["store", "path", "hub"]
MergeState = Literal["merged", "unmerged", "replaced", "gone"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRecord:
    """One catalogued base model.

    `fingerprint` is BLAKE3 in hex and None until the content is known (a Hub base that was not downloaded yet).
    `variant_of` names the base whose model this one stores otherwise; it always names the family's root. `same_as` names the
    other bases with the same content.
    `files` says of a base from the Hub what its weight files are at `revision`, by name: `size` in bytes, and `sha256` or
    git's `blob_id` in hex. A download is checked against it.
    """

    id: int
    name: str
    source: str
    revision: str | None
    path: Path | None
    fingerprint: str | None
    variant_of: str | None
    architecture: str | None
    model_type: str | None
    parameter_count: int | None
    size_bytes: int | None
    dtype: str | None
    created_at: datetime
    files: dict[str, Any] | None = None
    same_as: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Where the files of an adapter lie.

    `store`: in the content store, under `store_key`. `path`: a file or a PEFT folder at `path`. `hub`: in the Hub
    repository `repo` at the commit `revision`, in the folder or file `path_in_repo` where it is not at its top.
    """

    kind: LocationKind
    store_key: str | None = None
    path: Path | None = None
    repo: str | None = None
    revision: str | None = None
    path_in_repo: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """What is known of an adapter before it is catalogued.

    `sha256` is the hex digest of the weights file. `rank` is the largest rank, `ranks` the rank of each module.
    `scaling` is one number, or one of each module. `recipe`, `metrics` and `config` hold anything JSON can.
    `format` is how its files are laid out, `family` the kind of models that it is for, in its trainer's word.
    """

    kind: str
    sha256: str
    size_bytes: int
    rank: int | None = None
    ranks: Mapping[str, int] | None = None
    alpha: float | None = None
    scaling: float | Mapping[str, float] | None = None
    target_modules: Sequence[str] | str | None = None
    dtype: str | None = None
    parameter_count: int | None = None
    base_fingerprint: str | None = None
    base_model: str | None = None
    recipe: Mapping[str, Any] | None = None
    metrics: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | None = None
    format: str | None = None
    tensor_count: int | None = None
    family: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSummary:
    """One version of an adapter as a list shows it. `base` is the catalogued name of its base model, where known."""

    id: int
    name: str
    version: int
    kind: str
    sha256: str
    rank: int | None
    alpha: float | None
    target_modules: list[str] | str | None
    dtype: str | None
    size_bytes: int
    parameter_count: int | None
    base: str | None
    base_fingerprint: str | None
    base_model: str | None
    tags: tuple[str, ...]
    created_at: datetime

    @property
    def is_catalogued(self) -> bool:
        """Whether the catalogue has it; what was made while nothing could be written there has version 0."""
        return self.version > 0

    @property
    def reference(self) -> str:
        """`name@version`; the name alone of one that is not in the catalogue."""
        return f"{self.name}@{self.version}" if self.is_catalogued else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRecord(AdapterSummary):
    """One version of an adapter with everything the catalogue knows of it."""

    ranks: dict[str, int] | None
    scaling: float | dict[str, float] | None
    recipe: dict[str, Any] | None
    metrics: dict[str, Any] | None
    config: dict[str, Any] | None
    locations: tuple[Location, ...]
    format: str | None = None
    tensor_count: int | None = None
    family: str | None = None


def uncatalogued(name: str, facts: AdapterFacts) -> AdapterRecord:
    """An adapter's facts in the form of an entry, for one that the catalogue does not have."""
    known = {field: getattr(facts, field) for field in AdapterFacts.__dataclass_fields__}
    return AdapterRecord(
        **known, id=0, name=name, version=0, base=None, tags=(), created_at=datetime.now(UTC), locations=()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LineageRecord:
    """`child` came from `parent` by `operation`.

    Both are `name@version`; `parent` may be a label (a file's name, say), with `parent_id` None, where the parent is
    not in the catalogue, or no longer.
    """

    child_id: int
    child: str
    parent_id: int | None
    parent: str
    parent_sha256: str | None
    operation: str
    details: dict[str, Any] | None
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedAdapter:
    """One adapter of a merge. `adapter` is `name@version`, or a path where it was not catalogued."""

    adapter: str
    sha256: str
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRecord:
    """One merge: these adapters, with these weights, into that base, gave the model in the folder `output`."""

    id: int
    base: str | None
    base_fingerprint: str
    output: Path
    output_fingerprint: str | None
    adapters: tuple[MergedAdapter, ...]
    undo_file: Path | None
    in_place: bool
    options: dict[str, Any] | None
    state: MergeState
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How many entries the catalogue holds. `adapters` counts names, `versions` all their versions."""

    bases: int
    adapters: int
    versions: int
    merges: int


FindingKind = Literal[
    "adapter-files-missing",
    "base-missing",
    "merge-output-missing",
    "undo-file-missing",
    "store-orphan",
    "store-damaged",
    "leftover",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that `doctor` found wrong. `message` says what to do; `size_bytes` is what gc would free."""

    kind: FindingKind
    subject: str
    path: Path | None
    message: str
    size_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Freed:
    """What a garbage collection removed from the store, and of how many `merges` it noted that what they wrote is gone, or
    there again.

    `shared_with` names the other catalogues with files in the store, because of which nothing was removed.
    """

    entries: int
    size_bytes: int
    merges: int
    shared_with: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """What a rebuild entered again: `named` adapters and `bases` by their names; and the store's entries that it cannot name."""

    named: tuple[str, ...]
    bases: tuple[str, ...]
    unnamed: tuple[Finding, ...]
