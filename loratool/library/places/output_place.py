"""Places of outputs: by default beside the base, never over a source or over a file that must be kept."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from loratool.checkpoint.model import CONFIG_NAME
from loratool.checkpoint.output_kind import OutputKind
from loratool.checkpoint.staging import refuse_existing, refuse_impossible
from loratool.errors import OutputError, quoted


def beside_base(base: Path, name: str) -> Path:
    """Return the path of a folder `name` beside the base, or in the working folder for a base in the Hub's cache.

    For a base that is a file in a model's folder, it is beside that folder. Inside, it would become a part of the model.
    """
    path = base.resolve()
    within = path.is_file() and (path.parent / CONFIG_NAME).is_file()
    parent = Path.cwd() if "snapshots" in path.parts else path.parent.parent if within else path.parent
    return parent / re.sub(r"[^\w.+-]+", "-", name)


def refuse_overlap(out: Path, sources: Iterable[Path]) -> None:
    """Raise OutputError if the output equals, contains, or is inside one of the `sources` it is made from."""
    refuse_impossible(out)
    real = Path(os.path.realpath(out))
    for path in sources:
        source = Path(os.path.realpath(path))
        if real == source or source in real.parents or real in source.parents:
            raise OutputError(f"the output {quoted(out)} and its input {quoted(path)} overlap; choose another --out")


def refuse_or_note_existing(out: Path, kind: OutputKind, *, force: bool, dry_run: bool) -> list[str]:
    """Raise OutputError if an output of this kind must not be written to `out`; in a dry run, return the message as a note."""
    try:
        refuse_existing(out, kind, force=force)
    except OutputError as error:
        if not dry_run:
            raise
        return [str(error)]
    return []
