"""Selection of the files in a merged model's folder that are sent to the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loratool.checkpoint.file_role import FileRole, role_of
from loratool.checkpoint.links import leads_outside
from loratool.checkpoint.model import Checkpoint, has_file
from loratool.checkpoint.output_kind import UNDO_FOLDER
from loratool.errors import CheckpointError, HubError, NotFoundError, quoted
from loratool.hub.readme import README
from loratool.merging.manifest import Manifest

_STAY: Final = {
    FileRole.OWN: "it is loratool's own and holds the adapters",
    FileRole.ADAPTER: "transformers would put that adapter on top of the model",
}
"""Roles of files that are never sent, with the reason."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """Files to send, weights and others, by names relative to the model's folder, and notes on files that stay."""

    names: tuple[str, ...]
    notes: tuple[str, ...]


def choose_files(model: Checkpoint, manifest: Manifest, files: Sequence[str | os.PathLike[str]], *,
                 all_files: bool) -> Chosen:  # fmt: skip
    """Choose the weights, the files that the manifest lists, and the named `files`; with `all_files` everything that may be sent.

    The README is not among them, since it is made again. The state of a training is sent only if it is named or with
    `all_files`.

    Raises:
        NotFoundError, HubError: a named file is not in the folder, or must not be sent.
        CheckpointError: a file that the model needs is missing, or is a link that leads out of the folder.
    """
    weights = {header.file.name for header in model.headers}
    present = {str(name) for name in model.other_files() if str(name) != README}
    listed = {name for name in manifest.files if name != README and role_of(name) not in _STAY}
    named = {name for given in files for name in _named(given, model, present)}
    sendable = {name for name in present if role_of(name) not in _STAY}
    usual = {name for name in listed if role_of(name) is not FileRole.TRAINING_STATE}
    chosen = weights | usual | named | (sendable if all_files else set())
    _refuse_missing(chosen - weights, model)
    chosen = {name for name in chosen if name in weights or has_file(model.folder / name)}
    return Chosen(tuple(sorted(chosen)), tuple(_notes(sendable - chosen, present)))


def _named(given: str | os.PathLike[str], model: Checkpoint, present: Iterable[str]) -> list[str]:
    """Return the files that the user named: one in the folder, by path or relative name, or all files of a subfolder."""
    path = Path(given)
    inside = (
        path if not path.is_absolute() and (model.folder / path).exists() else Path(os.path.relpath(path, model.folder))
    )
    name = inside.as_posix()
    found = [each for each in present if each == name or each.startswith(f"{name}/")]
    if not found:
        raise NotFoundError(
            f"there is no file {quoted(given)} in {quoted(model.folder)} to send; name a file in that folder"
        )
    for each in found:
        if role_of(each) in _STAY:
            raise HubError(f"{quoted(each)} is not sent with a model: {_STAY[role_of(each)]}; leave it out of --file")
    return found


def _refuse_missing(names: Iterable[str], model: Checkpoint) -> None:
    for name in sorted(names):
        file = model.folder / name
        is_here = ".." not in Path(name).parts and not Path(name).is_absolute() and has_file(file)
        if not is_here and not role_of(name).is_editable:
            raise CheckpointError(
                f"the file {quoted(name)}, which the manifest lists, is not in {quoted(model.folder)}; merge again"
            )
        if is_here and leads_outside(file, model.folder):
            raise CheckpointError(
                f"{quoted(file)} is a link that leads out of its folder; put the file itself there to push it"
            )


def _notes(left: Iterable[str], present: Iterable[str]) -> list[str]:
    """Return notes on files that stay, and how to send them."""
    notes = []
    if any(name.startswith(f"{UNDO_FOLDER}/") for name in present):
        notes.append(
            f"the undo file stays here ({UNDO_FOLDER}/): it holds the adapters, and those who have the base do not need it"
        )
    adapter = next((name for name in sorted(present) if role_of(name) is FileRole.ADAPTER), None)
    if adapter is not None:
        notes.append(f"{quoted(adapter)} stays here: {_STAY[FileRole.ADAPTER]}")
    staying = sorted(left)
    if staying:
        more = f", as do {len(staying) - 1:,} others" if staying[1:] else ""
        notes.append(
            f"{quoted(staying[0])} does not belong to the model and stays here{more}; --file sends one, --all-files all"
        )
    return notes
