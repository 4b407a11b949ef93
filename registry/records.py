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

    `fingerprint` is BLAKE3 in hex, or None until the content is known (a Hub base that was not downloaded yet).
    `variant_of` names the root of its family, of which it is the same model in a different storage. `same_as` names the
    other bases with the same content.
    `files` lists the weight files of a Hub base at `revision`, by name: `size` in bytes, and `sha256` or git's `blob_id` in
    hex. Downloads are checked against it.
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
class ModelFacts:
    """The facts about a base model that its configuration and headers give.

    `architecture` is its transformers class, `dtype` the type of most of its bytes.
    """

    architecture: str | None = None
    model_type: str | None = None
    parameter_count: int | None = None
    size_bytes: int | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """A place of an adapter's files.

    `store`: in the content store, under `store_key`. `path`: a file or a PEFT folder at `path`. `hub`: in the Hub
    repository `repo` at the commit `revision`, at its top or in the folder or file `path_in_repo`.
    """

    kind: LocationKind
    store_key: str | None = None
    path: Path | None = None
    repo: str | None = None
    revision: str | None = None
    path_in_repo: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """The facts about an adapter before it is catalogued.

    `sha256` is the hex digest of the weights file. `rank` is the largest rank, `ranks` the rank of each module.
    `scaling` is one number, or one for each module. `recipe`, `metrics` and `config` hold any JSON.
    `format` is the format of its files. `family` is the family of models it is for, as its trainer calls it.
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
    """One version of an adapter in a list. `base` is the catalogued name of its base model, if known."""

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
        """Whether it is in the catalogue. An adapter made while the catalogue could not be written has version 0."""
        return self.version > 0

    @property
    def reference(self) -> str:
        """`name@version`, or `name` if it is not in the catalogue."""
        return f"{self.name}@{self.version}" if self.is_catalogued else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRecord(AdapterSummary):
    """One version of an adapter with all of its facts in the catalogue."""

    ranks: dict[str, int] | None
    scaling: float | dict[str, float] | None
    recipe: dict[str, Any] | None
    metrics: dict[str, Any] | None
    config: dict[str, Any] | None
    locations: tuple[Location, ...]
    format: str | None = None
    tensor_count: int | None = None
    family: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovedAdapter:
    """One adapter in the trash. `entry` has all of its facts; `store_key` names its files' entry in the store, if any.

    `fault` says why the row of a damaged one cannot be used, whose `entry` is empty.
    """

    id: int
    name: str
    version: int
    kind: str
    sha256: str
    size_bytes: int
    store_key: str | None
    removed_at: datetime
    entry: Mapping[str, Any]
    fault: str | None = None

    @property
    def reference(self) -> str:
        """`name@version`, as it was called."""
        return f"{self.name}@{self.version}"

    def record(self) -> AdapterRecord:
        """Its facts in the form of an entry of the catalogue, in which it is no more (`id` is 0)."""
        facts: dict[str, Any] = {name: self.entry.get(name) for name in AdapterFacts.__dataclass_fields__}
        facts |= {"kind": self.kind, "sha256": self.sha256, "size_bytes": self.size_bytes}
        places = [Location(kind="store", store_key=self.store_key)] if self.store_key else []
        for place in self.entry.get("locations", ()):
            path = None if place["path"] is None else Path(place["path"])
            places.append(Location(**place | {"path": path}))
        known: dict[str, Any] = {
            "id": 0,
            "name": self.name,
            "version": self.version,
            "base": self.entry.get("base"),
            "tags": tuple(self.entry.get("tags", ())),
            "created_at": datetime.fromisoformat(self.entry["created_at"]) if self.entry else self.removed_at,
            "locations": tuple(places),
        }
        return AdapterRecord(**(facts | known))


def uncatalogued(name: str, facts: AdapterFacts) -> AdapterRecord:
    """Return the facts of an uncatalogued adapter in the form of a record."""
    known = {field: getattr(facts, field) for field in AdapterFacts.__dataclass_fields__}
    return AdapterRecord(
        **known, id=0, name=name, version=0, base=None, tags=(), created_at=datetime.now(UTC), locations=()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LineageRecord:
    """`child` was made from `parent` by `operation`.

    Both are `name@version`. If the parent is not or no longer in the catalogue, `parent` is a label, such as a file's name, and
    `parent_id` is None.
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
    """One adapter of a merge. `adapter` is `name@version`, or a path if it was not catalogued."""

    adapter: str
    sha256: str
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRecord:
    """One merge of adapters into a base, with the result in the folder `output`."""

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
    """The numbers of entries in the catalogue. `adapters` counts names, `versions` all their versions."""

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
    "row-damaged",
    "store-foreign",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One problem that `doctor` found. `message` says what to do. `size_bytes` is what gc would free."""

    kind: FindingKind
    subject: str
    path: Path | None
    message: str
    size_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Freed:
    """The result of a garbage collection.

    `entries` and `size_bytes` count what it removed from the store. `merges` counts the merges whose state it corrected,
    because their outputs are gone or back. `shared_with` names other catalogues with files in the store; if there are any,
    nothing was removed. `emptied` names the adapters whose time in the trash was over.
    """

    entries: int
    size_bytes: int
    merges: int
    shared_with: tuple[str, ...] = ()
    emptied: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """The result of a rebuild: references of the adapters and names of the bases it restored, and entries it could not name.

    `repaired` names the adapters, of the catalogue or its trash, whose damaged rows it corrected.
    """

    named: tuple[str, ...]
    bases: tuple[str, ...]
    unnamed: tuple[Finding, ...]
    repaired: tuple[str, ...] = ()
