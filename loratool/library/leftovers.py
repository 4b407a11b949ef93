"""What killed runs left, wherever it lies: partial outputs, changes in place that are not finished, scratch in the home folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loratool.checkpoint.header import JOURNAL
from loratool.checkpoint.journal import locked
from loratool.checkpoint.staging import discard_partial, partials_of
from loratool.checkpoint.unfinished import DRAFT_SUFFIX, Unfinished, taken_over
from loratool.errors import LoratoolError, quoted
from loratool.library.resolve import RUNNING
from loratool.library.training_run import abandoned_runs
from registry import Finding, home

ABANDONED_AFTER_SECONDS: Final = 3600.0
"""Scratch of a run whose process cannot be told is left alone for so long."""


@dataclass(frozen=True, slots=True)
class Cleared:
    """How much of killed runs was removed, or finished."""

    entries: int = 0
    size_bytes: int = 0

    def __add__(self, other: Cleared) -> Cleared:
        return Cleared(self.entries + other.entries, self.size_bytes + other.size_bytes)


def find_leftovers() -> tuple[Finding, ...]:
    """One finding for each thing that a run which is dead has left."""
    with taken_over(home() / RUNNING) as notes:
        found = [finding for note in notes for finding in _findings(note)]
    scratch = [*_scratch(), *abandoned_runs()]
    return tuple([*found, *(_finding(path, "scratch of a run that was killed") for path in scratch)])


def clear_leftovers() -> Cleared:
    """Remove what runs that are dead have left, and finish or take back their changes in place."""
    cleared = Cleared()
    with taken_over(home() / RUNNING) as notes:
        for note in notes:
            if note.facts.get("what") == "output":
                for path in partials_of(Path(note.facts["out"])):
                    cleared += Cleared(1, discard_partial(path, Path(note.facts["out"])))
            elif note.facts.get("what") == "change" and is_left(note):
                with suppress(LoratoolError), locked(Path(note.facts["folder"]), exclusive=True):
                    cleared += Cleared(1)
            if not is_left(note):
                note.forget()
    return cleared
