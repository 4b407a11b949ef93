"""Which files of a model's folder come along into a model that is made of it, and why others do not."""

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
    """The files that come along as they are: paths relative to the folder; and notes on those that do not."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


def inherited_files(source: Checkpoint) -> Inherited:
    """Decide for each file beside a model's weights whether a model that is made of it inherits it.

    Everything does but the manifest, an adapter's files, which transformers would load in place of the new model's
    weights or on top of them, and links that lead out of the folder, whose targets are no part of the model.

    Raises:
        CheckpointError: a link that leads out stands for a file that programs load the model by.
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
            f"{_listed(adapters)} of an adapter in the base's folder: left out, since transformers would put that adapter on "
            "top of the new model"
        )
    if links:
        notes.append(f"{_listed(links)}: left out, as a link that leads out of the base's folder")
    return Inherited(tuple(files), tuple(notes))


def _listed(names: Sequence[Path]) -> str:
    return quoted(names[0]) + (f" and {len(names) - 1:,} more" if names[1:] else "")
