"""Selection of the files in a model's folder that a new model inherits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loratool.checkpoint.file_role import FileRole, role_of
from loratool.checkpoint.links import leads_outside
from loratool.checkpoint.model import Checkpoint
from loratool.checkpoint.output_kind import OWN_FILE
from loratool.errors import CheckpointError, quoted


@dataclass(frozen=True, slots=True)
class Inherited:
    """Files that are copied unchanged, as paths relative to the folder, and notes on files that are left out."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


def inherited_files(source: Checkpoint) -> Inherited:
    """Decide which files beside a model's weights a new model inherits.

    It inherits all but these:

    - the manifest;
    - an adapter's files, which transformers would load instead of the new weights or on top of them;
    - links that lead out of the folder, since their targets do not belong to the model.

    Raises:
        CheckpointError: such a link stands for a file that is needed to load the model.
    """
    files, adapters, links = [], [], []
    for name in source.other_files():
        role = role_of(name)
        if str(name) == OWN_FILE:
            continue
        if role is FileRole.ADAPTER:
            adapters.append(name)
        elif leads_outside(source.folder / name, source.folder):
            if role.is_needed:
                raise CheckpointError(
                    f"{quoted(source.folder / name)} is a link that leads out of the model's folder, so it is not copied; "
                    "put the file itself in its place"
                )
            links.append(name)
        else:
            files.append(name)
    notes = []
    if adapters:
        notes.append(
            f"{_listed(adapters)} of an adapter in the base's folder: left out, since transformers would apply that adapter to "
            "the new model"
        )
    if links:
        notes.append(f"{_listed(links)}: left out, as a link that leads out of the base's folder")
    return Inherited(tuple(files), tuple(notes))


def _listed(names: Sequence[Path]) -> str:
    return quoted(names[0]) + (f" and {len(names) - 1:,} more" if names[1:] else "")
