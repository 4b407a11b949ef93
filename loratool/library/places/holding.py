"""Locking of a model's folder while a command reads or changes it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from loratool.checkpoint.journal import locked


def hold(path: Path, *, exclusive: bool) -> AbstractContextManager[None]:
    """Lock a model's folder against other processes (see `checkpoint.journal.locked`). A single file is not locked."""
    return locked(path, exclusive=exclusive) if path.is_dir() else nullcontext()
