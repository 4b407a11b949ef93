"""``loratool.json``, the manifest of a model that loratool made: what was merged into what, and every digest.

It contains nothing that changes between runs, so equal merges give equal bytes.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import zstandard

from loratool.checkpoint.json_text import LARGEST_LISTING, parse_json_object, read_limited
from loratool.errors import CheckpointError, NotFoundError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.at_rank import at_rank
from loratool.formats.kinds import kind_named
from loratool.merging.changed_files import ChangedFile, may_change
from loratool.merging.delivery import Delivery
from loratool.merging.stream import Digests

MANIFEST_NAME: Final = "loratool.json"
SCHEMA: Final = 1
KINDS: Final = ("merge", "quantization")
CONVERSIONS: Final = frozenset({"quantize", "base_as", "dequantize"})
"""Options of a model in another storage than its base's."""

MAX_PREVIOUS_BYTES: Final = 1 << 26
"""Size limit of a base's manifest that is kept inside a manifest, in bytes."""

_HEX: Final = re.compile(r"[0-9a-f]{64}")
_UNDO: Final = re.compile(r"loratool-undo/[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class HeldAdapter:
    """The identity of an adapter that a model's weights contain; the attributes are those of `MergedAdapter`."""

    name: str
    sha256: str
    weight: float
    content: str = ""
    parents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """One adapter of a merge. `file` is the file that it was read from, or "".

    `sha256` and the settings identify the adapter when it is read again. `content` is the fingerprint of its tensors, independent
    of the file, and `parents` are the sha256 of the adapters that it was made from. In manifests of earlier versions `scaling` is
    None and `content` is empty.
    """

    name: str
    sha256: str
    weight: float
    kind: str
    rank: int | None
    alpha: float | None
    file: str
    scaling: float | Mapping[str, float] | None = None
    content: str = ""
    parents: tuple[str, ...] = ()

    @property
    def held(self) -> HeldAdapter:
        """Return its identity for later merges into the same weights."""
        return HeldAdapter(self.name, self.sha256, self.weight, self.content, self.parents)

    def restored(self, adapter: Adapter) -> Adapter:
        """Return `adapter`, this one read again, at the rank at which it was merged."""
        if not kind_named(adapter.kind).nested or self.rank is None or adapter.rank == self.rank:
            return adapter
        return at_rank(adapter, self.rank)

    def is_it(self, adapter: Adapter) -> bool:
        """Return whether `adapter`, read again, is the one that was merged, at any rank."""
        if (adapter.sha256, adapter.kind, adapter.alpha) != (self.sha256, self.kind, self.alpha):
            return False
        return self.scaling is None or self.restored(adapter).scaling == self.scaling


@dataclass(frozen=True, slots=True)
class Untied:
    """An output head that was untied from `embedding`, and the `sizes` of the base's weight files in bytes."""

    head: str
    embedding: str
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Manifest:
    """The record of a merge or a quantization.

    Attributes:
        base_name: the base's catalogued name or folder name.
        base_path: the base's path at that time.
        base_fingerprint: BLAKE3 fingerprint of the base.
        fingerprint: BLAKE3 fingerprint of the merged model.
        adapters: in the order in which they were added.
        options: other settings that decide the bytes: ``device``, ``seed``, and the storage if it is not the base's.
        versions: versions of the programs that computed them.
        changed: digests before and after of every tensor that changed; empty if the storage changed.
        unchanged: names of the planned tensors and matrices that kept the base's bytes, because their update is zero or was
          lost by rounding.
        tensors: digest of every tensor of the merged model.
        files: digest of every other file, by path relative to the folder.
        undo: folder of the undo file, relative; None if none was written.
        undo_adapters: sha256 of each adapter beside the undo file; empty if they were not recorded.
        earlier: the adapters that the base already contained, if no `previous` manifest records them.
        previous: content of the base's manifest, if the base was itself merged. It is stored as
          base64 of Zstandard, because manifests within manifests would double in size with every merge.
        in_place: whether the base's own files were changed.
        delivery: how much of the update each parameter received, but for replaced ones.
        delivery_of_all: the same for all of them together; None if none was measured.
        kind: ``merge``, or ``quantization``, which has no adapters.
        untied: how the head was untied from the embedding; None if it was not.
        changed_files: the files beside the weights that differ from the base's, by name, such as an adapter's tokenizer.
    """

    base_name: str
    base_path: str
    base_fingerprint: str
    fingerprint: str
    adapters: tuple[MergedAdapter, ...]
    options: Mapping[str, str]
    versions: Mapping[str, str]
    changed: Mapping[str, Digests]
    tensors: Mapping[str, str]
    files: Mapping[str, str] = field(default_factory=dict)
    undo: str | None = None
    undo_adapters: tuple[str, ...] = ()
    previous: bytes | None = None
    in_place: bool = False
    delivery: Mapping[str, Delivery] = field(default_factory=dict)
    delivery_of_all: Delivery | None = None
    kind: str = "merge"
    unchanged: tuple[str, ...] = ()
    earlier: tuple[HeldAdapter, ...] = ()
    changed_files: Mapping[str, ChangedFile] = field(default_factory=dict)
    untied: Untied | None = None

    @property
    def converted(self) -> bool:
        """Whether the model's storage differs from its base's, so that they may share no tensors."""
        return not CONVERSIONS.isdisjoint(self.options)

    def for_others(self, base: str, files: Mapping[str, str] | None = None) -> Manifest:
        """Return the manifest for a copy that leaves this machine: without local paths and without the undo file.

        `base` is the base's public name, and `files` are the digests of the other files in the copy. The README is not
        recorded, because the copy has its own.
        """
        earlier = self.previous and parse_manifest(self.previous, Path(MANIFEST_NAME), KINDS)
        return replace(
            self,
            base_path=base,
            adapters=tuple(replace(adapter, file="") for adapter in self.adapters),
            files={name: digest for name, digest in (files or self.files).items() if name != "README.md"},
            undo=None,
            undo_adapters=(),
            previous=earlier.for_others(earlier.base_name).to_json().encode() if earlier else None,
        )

    def to_json(self) -> str:
        """Return the text of the manifest file."""
        value = {
            "schema": SCHEMA,
            "kind": self.kind,
            "base": {"name": self.base_name, "path": self.base_path, "fingerprint": self.base_fingerprint},
            "fingerprint": self.fingerprint,
            "adapters": [asdict(adapter) for adapter in self.adapters],
            "earlier": [asdict(adapter) for adapter in self.earlier],
            "options": dict(self.options),
            "versions": dict(self.versions),
            "changed": {name: [digests.before, digests.after] for name, digests in self.changed.items()},
            "unchanged": list(self.unchanged),
            "tensors": dict(self.tensors),
            "files": dict(self.files),
            "undo": self.undo,
            "undo_adapters": list(self.undo_adapters),
            "previous": None if self.previous is None else _pack(self.previous),
            "in_place": self.in_place,
        }
        if self.changed_files:
            value["changed_files"] = {name: asdict(each) for name, each in self.changed_files.items()}
        if self.untied is not None:
            value["untied"] = asdict(self.untied)
        if self.delivery_of_all is not None:
            each = {name: delivery.to_json() for name, delivery in self.delivery.items()}
            value["delivery"] = {"all": self.delivery_of_all.to_json(), "tensors": each}
        return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def read_manifest(folder: Path, kinds: Collection[str] = ("merge",)) -> Manifest:
    """Read the manifest of the model in `folder`, which must be of one of these `kinds`.

    Raises:
        NotFoundError: the folder has none, so loratool did not make the model.
        CheckpointError: it is damaged, or from a later version of loratool.
    """
    file = folder / MANIFEST_NAME
    if not file.is_file():
        raise NotFoundError(
            f"{quoted(folder)} has no {MANIFEST_NAME}: loratool did not merge it; "
            "give a folder that 'loratool merge' wrote"
        )
    return parse_manifest(read_limited(file, LARGEST_LISTING), file, kinds)


def parse_manifest(text: bytes, file: Path, kinds: Collection[str] = ("merge",)) -> Manifest:
    """Parse and check the `text` of a manifest; raises like `read_manifest`, naming `file`."""
    value = parse_json_object(text, file)
    if value.get("kind") not in kinds:
        raise NotFoundError(f"{quoted(file)} does not describe a merge; give the folder of a merged model")
    if value.get("schema") != SCHEMA:
        raise CheckpointError(f"{quoted(file)} was written by another version of loratool; use that one")
    try:
        return _from_json(value)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise CheckpointError(f"{quoted(file)} is damaged; merge again, or restore the file") from None


def _from_json(value: Mapping[str, Any]) -> Manifest:
    base = value["base"]
    if not value["changed"].keys() <= value["tensors"].keys():
        raise ValueError("changed")
    delivery = value.get("delivery") or value.get("survival", {})  # its name in earlier versions
    undo_adapters = tuple(_digest(digest) for digest in value.get("undo_adapters", ()))
    if undo_adapters and len(undo_adapters) != len(value["adapters"]):
        raise ValueError("undo_adapters")
    return Manifest(
        base_name=_text(base["name"]),
        base_path=_text(base["path"]),
        base_fingerprint=_digest(base["fingerprint"]),
        fingerprint=_digest(value["fingerprint"]),
        adapters=tuple(_adapter(entry) for entry in value["adapters"]),
        options={_text(key): _text(item) for key, item in value["options"].items()},
        versions={_text(key): _text(item) for key, item in value["versions"].items()},
        changed={_text(name): Digests(_digest(pair[0]), _digest(pair[1])) for name, pair in value["changed"].items()},
        tensors={_text(name): _digest(digest) for name, digest in value["tensors"].items()},
        files={_text(name): _digest(digest) for name, digest in value["files"].items()},
        undo=None if value["undo"] is None else _matching(_UNDO, value["undo"]),
        undo_adapters=undo_adapters,
        previous=None if value["previous"] is None else _unpack(_text(value["previous"])),
        in_place=_truth(value.get("in_place", False)),
        delivery={_text(name): Delivery.from_json(entry) for name, entry in delivery.get("tensors", {}).items()},
        delivery_of_all=Delivery.from_json(delivery["all"]) if delivery else None,
        kind=_text(value["kind"]),
        unchanged=tuple(_text(name) for name in value.get("unchanged", ())),
        earlier=tuple(_held(entry) for entry in value.get("earlier", ())),
        untied=None if value.get("untied") is None else _untied(value["untied"]),
        changed_files={_plain(name): _changed_file(entry) for name, entry in value.get("changed_files", {}).items()},
    )


def _untied(entry: Mapping[str, Any]) -> Untied:
    return Untied(
        _text(entry["head"]),
        _text(entry["embedding"]),
        {_text(name): int(size) for name, size in entry["sizes"].items()},
    )


def _changed_file(entry: Mapping[str, Any]) -> ChangedFile:
    before = entry["before"]
    return ChangedFile(_text(entry["source"]), None if before is None else _digest(before))


def _plain(name: object) -> str:
    """Check the name of a file that an unmerge may replace."""
    if not may_change(_text(name)):
        raise ValueError(name)
    return _text(name)


def _adapter(entry: Mapping[str, Any]) -> MergedAdapter:
    return MergedAdapter(
        name=_text(entry["name"]),
        sha256=_digest(entry["sha256"]),
        weight=float(entry["weight"]),
        kind=_text(entry["kind"]),
        rank=None if entry["rank"] is None else int(entry["rank"]),
        alpha=None if entry["alpha"] is None else float(entry["alpha"]),
        file=_text(entry["file"]),
        scaling=_scaling(entry.get("scaling")),
        content=_digest(entry["content"]) if entry.get("content") else "",
        parents=tuple(_digest(parent) for parent in entry.get("parents", ())),
    )


def _held(entry: Mapping[str, Any]) -> HeldAdapter:
    return HeldAdapter(
        name=_text(entry["name"]),
        sha256=_digest(entry["sha256"]),
        weight=float(entry["weight"]),
        content=_digest(entry["content"]) if entry.get("content") else "",
        parents=tuple(_digest(parent) for parent in entry.get("parents", ())),
    )


def _scaling(value: object) -> float | Mapping[str, float] | None:
    if isinstance(value, Mapping):
        return {_text(module): float(scaling) for module, scaling in value.items()}
    return None if value is None else float(value)  # type: ignore[arg-type]


def _pack(content: bytes) -> str:
    return base64.b64encode(zstandard.ZstdCompressor().compress(content)).decode()


def _unpack(text: str) -> bytes:
    packed = base64.b64decode(text, validate=True)
    try:
        if zstandard.get_frame_parameters(packed).content_size > MAX_PREVIOUS_BYTES:
            raise ValueError("too large")
        return zstandard.ZstdDecompressor().decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError:
        raise ValueError("previous") from None


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(value)
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _matching(pattern: re.Pattern[str], value: object) -> str:
    if pattern.fullmatch(_text(value)) is None:
        raise ValueError(value)
    return _text(value)


def _digest(value: object) -> str:
    return _matching(_HEX, value)
