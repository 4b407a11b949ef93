"""The manifest of a merge, ``loratool.json`` in the merged model: what was merged into what, and every digest.

It holds nothing that changes from run to run, so equal merges give equal bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from loratool.checkpoint.header import parse_json_object
from loratool.errors import CheckpointError, NotFoundError, quoted
from loratool.merging.rewrite import Digests

MANIFEST_NAME: Final = "loratool.json"
SCHEMA: Final = 1
_HEX: Final = re.compile(r"[0-9a-f]{64}")
_UNDO: Final = re.compile(r"loratool-undo/[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """One adapter of a merge. `file` is where it was read, or "" ; `sha256` tells whether that is still it."""

    name: str
    sha256: str
    weight: float
    kind: str
    rank: int
    alpha: float
    file: str


@dataclass(frozen=True)
class Manifest:
    """What a merge did.

    Attributes:
        base_name: the base's catalogued name or folder name.
        base_path: where the base was.
        base_fingerprint: BLAKE3 fingerprint of the base.
        fingerprint: of the merged model.
        adapters: in the order in which they were added.
        options: what else decides the bytes (``device``).
        versions: of the programs that computed them.
        changed: digests before and after, of every tensor that changed.
        tensors: digest of every tensor of the merged model.
        files: digest of every other file, by path relative to the folder.
        undo: folder of the undo file, relative; None where none was written.
        previous: text of the manifest that the base had, where the base was itself merged.
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
    previous: str | None = None

    def to_json(self) -> str:
        """The text of the manifest file."""
        value = {
            "schema": SCHEMA,
            "kind": "merge",
            "base": {"name": self.base_name, "path": self.base_path, "fingerprint": self.base_fingerprint},
            "fingerprint": self.fingerprint,
            "adapters": [{key: getattr(adapter, key) for key in MergedAdapter.__slots__} for adapter in self.adapters],
            "options": dict(self.options),
            "versions": dict(self.versions),
            "changed": {name: [digests.before, digests.after] for name, digests in self.changed.items()},
            "tensors": dict(self.tensors),
            "files": dict(self.files),
            "undo": self.undo,
            "previous": self.previous,
        }
        return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the merged model in `folder`.

    Raises:
        NotFoundError: the folder has none: loratool did not merge it.
        CheckpointError: it is damaged, or of a later version of loratool.
    """
    file = folder / MANIFEST_NAME
    if not file.is_file():
        raise NotFoundError(
            f"{quoted(folder)} has no {MANIFEST_NAME}: loratool did not merge it; "
            "give a folder that 'loratool merge' wrote"
        )
    return parse_manifest(file.read_bytes(), file)


def parse_manifest(text: bytes, file: Path) -> Manifest:
    """Check and parse the `text` of a manifest; errors as `read_manifest`, naming `file`."""
    value = parse_json_object(text, file)
    if value.get("kind") != "merge":
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
        previous=None if value["previous"] is None else _text(value["previous"]),
    )


def _adapter(entry: Mapping[str, Any]) -> MergedAdapter:
    return MergedAdapter(
        name=_text(entry["name"]),
        sha256=_digest(entry["sha256"]),
        weight=float(entry["weight"]),
        kind=_text(entry["kind"]),
        rank=int(entry["rank"]),
        alpha=float(entry["alpha"]),
        file=_text(entry["file"]),
    )


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
