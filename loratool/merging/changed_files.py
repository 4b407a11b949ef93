"""Files beside a model's weights that a merge replaces or removes, and how the base's own are restored.

The manifest records the digest of each original. The undo folder keeps a copy named ``base.<name>``; without an undo folder the
original comes from the base.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from blake3 import blake3

from loratool.checkpoint.file_role import FileRole, role_of
from loratool.checkpoint.fingerprint import file_digest
from loratool.checkpoint.model import INDEX_SUFFIX, has_file
from loratool.errors import quoted

KEPT: Final = "base."
"""Prefix of the undo folder's copies of the base's files."""


_ROLES: Final = {FileRole.TOKENIZER, FileRole.CHAT_TEMPLATE, FileRole.CONFIGURATION}


def may_change(name: str) -> bool:
    """Return whether a merge may replace a file of this name: not weights, and not a file in a subfolder."""
    if not name or set(name) & set("/\\\0"):
        return False
    return role_of(name) in _ROLES or name.endswith(INDEX_SUFFIX)


@dataclass(frozen=True, slots=True)
class ChangedFile:
    """A file of a merged model that differs from the base's.

    It records where the new file is from ("" for a removed file). `before` is the digest of the base's own file, or None if the
    base had none.
    """

    source: str
    before: str | None


@dataclass(frozen=True, slots=True)
class FileChanges:
    """Files written beside the weights in place of the base's, by plain file names.

    Attributes:
        written: the new content, or the file that contains it.
        sources: where each file is from, as recorded in the manifest.
        removed: the base's files that have no counterpart.
    """

    written: Mapping[str, Path | bytes] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()

    @property
    def names(self) -> frozenset[str]:
        """The names of all files that differ from the base's."""
        return frozenset(self.written) | self.removed

    def joined(self, other: FileChanges) -> FileChanges:
        """Return both sets of changes together; they must concern different files."""
        return FileChanges(
            {**self.written, **other.written}, {**self.sources, **other.sources}, self.removed | other.removed
        )

    def write(self, folder: Path) -> None:
        """Write the new files into `folder`."""
        for name, content in sorted(self.written.items()):
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                shutil.copyfile(content, folder / name)

    def keep(self, base: Path, undo: Path) -> None:
        """Copy the base's own files into the undo folder `undo`."""
        for name in sorted(self.names):
            if has_file(base / name):
                shutil.copyfile(base / name, undo / f"{KEPT}{name}")

    def digests(self) -> dict[str, str]:
        """Return the BLAKE3 digest of each new file."""
        return {
            name: str(blake3(content).hexdigest()) if isinstance(content, bytes) else file_digest(content)
            for name, content in sorted(self.written.items())
        }

    def recorded(self, base: Path) -> dict[str, ChangedFile]:
        """Return the manifest's entries for these changes; `base` is the base's folder."""
        return {
            name: ChangedFile(
                self.sources.get(name, ""),
                file_digest(base / name) if has_file(base / name) else None,
            )
            for name in sorted(self.names)
        }


@dataclass(frozen=True, slots=True)
class Originals:
    """Where the base's own files are: the undo folder or the base's; `folder` is None if they are in neither."""

    folder: Path | None
    prefix: str = ""

    def restore(self, changed: Mapping[str, ChangedFile], into: Path) -> tuple[list[str], list[str]]:
        """Write the base's files into the folder `into`; return the names of unavailable originals and of files to remove."""
        missing, removed = [], []
        for name, each in sorted(changed.items()):
            if each.before is None:
                removed.append(name)
                continue
            original = None if self.folder is None else self.folder / f"{self.prefix}{name}"
            if original is None or not has_file(original) or file_digest(original) != each.before:
                missing.append(name)
                continue
            shutil.copyfile(original, into / name)
        return missing, removed


def edited_since(changed: Mapping[str, ChangedFile], digests: Mapping[str, str], folder: Path) -> Iterator[str]:
    """Return notes on files that the merge wrote and that were changed since."""
    for name in sorted(changed.keys() & digests.keys()):
        if has_file(folder / name) and file_digest(folder / name) != digests[name]:
            yield f"{quoted(name)} was changed after the merge; the base's own file replaces it"
