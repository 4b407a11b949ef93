"""Files beside a model's weights that a merge writes otherwise than the base has them, and how the base's come back.

What the base had is recorded by its digest. The undo folder keeps a copy of each, under ``base.`` and its name; without one it
comes back from the base.
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
"""What the undo folder's copies of the base's files begin with."""


_ROLES: Final = {FileRole.TOKENIZER, FileRole.CHAT_TEMPLATE, FileRole.CONFIGURATION}


def may_change(name: str) -> bool:
    """Whether a merge may write a file of this name otherwise than the base has it: no weights, no file of a folder's."""
    if not name or set(name) & set("/\\\0"):
        return False
    return role_of(name) in _ROLES or name.endswith(INDEX_SUFFIX)


@dataclass(frozen=True, slots=True)
class ChangedFile:
    """A file of a merged model that is not the base's: where it is from ("": it is left out), and the digest of the base's own.

    `before` is None where the base had none.
    """

    source: str
    before: str | None


@dataclass(frozen=True, slots=True)
class FileChanges:
    """What is written beside the weights in place of the base's files, by plain names.

    Attributes:
        written: the new content, or the file that has it.
        sources: what each is from, as a manifest says it.
        removed: the base's files that have no counterpart.
    """

    written: Mapping[str, Path | bytes] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()

    @property
    def names(self) -> frozenset[str]:
        """The names of all that is not as the base has it."""
        return frozenset(self.written) | self.removed

    def joined(self, other: FileChanges) -> FileChanges:
        """Return both changes together; they are of different files."""
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
        """BLAKE3 of each new file."""
        return {
            name: str(blake3(content).hexdigest()) if isinstance(content, bytes) else file_digest(content)
            for name, content in sorted(self.written.items())
        }

    def recorded(self, base: Path) -> dict[str, ChangedFile]:
        """What a manifest is to say of them; `base` is the base's folder."""
        return {
            name: ChangedFile(
                self.sources.get(name, ""),
                file_digest(base / name) if has_file(base / name) else None,
            )
            for name in sorted(self.names)
        }


@dataclass(frozen=True, slots=True)
class Originals:
    """The base's own files, in the undo folder or in the base's; `folder` is None where they are in neither."""

    folder: Path | None
    prefix: str = ""

    def restore(self, changed: Mapping[str, ChangedFile], into: Path) -> tuple[list[str], list[str]]:
        """Write the base's files into the folder `into`; the names of those that are not at hand, and of those that go."""
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
    """Notes on files that the merge wrote and somebody changed since."""
    for name in sorted(changed.keys() & digests.keys()):
        if has_file(folder / name) and file_digest(folder / name) != digests[name]:
            yield f"{quoted(name)} was changed after the merge; the base's own takes its place"
