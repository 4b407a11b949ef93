"""What killed runs left, wherever it lies: partial outputs, changes in place that are not finished, scratch in the home."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from loratool.checkpoint.header import JOURNAL
from loratool.checkpoint.journal import locked
from loratool.checkpoint.staging import clear_partials, partials_of, size_of
from loratool.checkpoint.unfinished import DRAFT_SUFFIX, taken_over
from loratool.errors import LoratoolError, quoted
from loratool.library.home_folder import RUNNING
from loratool.library.training_run import abandoned_runs, clear_run
from registry import Finding, home

KINDS: Final = ("output", "change")
"""What notes speak of that leaves something on the disk."""

SCRATCH: Final = ("digests/*.tmp", f"{RUNNING}/*{DRAFT_SUFFIX}")
SCRATCH_SECONDS: Final = 3600.0
"""Scratch is written in a moment; what is older than this was left."""


def find_leftovers() -> tuple[Finding, ...]:
    """One finding for each thing that a run left which was killed."""
    with taken_over(home() / RUNNING) as notes:
        found = [_finding(note.facts) for note in notes if is_left(note.facts)]
    way = "is what a run that was killed left; 'loratool doctor --gc' frees it"
    return (*found, *(_leftover(path, f"{quoted(path)} {way}") for path in (*abandoned_runs(), *_scratch())))


def clear_leftovers() -> tuple[int, int]:
    """Remove what killed runs left, and finish or take back their changes in place: how much that was, and its bytes."""
    entries = size_bytes = 0
    with taken_over(home() / RUNNING) as notes:
        for note in notes:
            if note.facts.get("what") not in KINDS:
                continue
            if is_left(note.facts):
                entries, size_bytes = entries + 1, size_bytes + _clear(note.facts)
            if not is_left(note.facts):
                note.forget()
    for run in abandoned_runs():
        entries, size_bytes = entries + 1, size_bytes + clear_run(run)
    for file in _scratch():
        with suppress(OSError):
            entries, size_bytes = entries + 1, size_bytes + file.stat().st_size
            file.unlink()
    return entries, size_bytes


def _clear(facts: Mapping[str, Any]) -> int:
    """Remove a partial output, or finish or take back a change in place; the bytes that were freed."""
    if facts["what"] == "output":
        return clear_partials(Path(facts["out"]))
    with suppress(LoratoolError), locked(Path(facts["folder"]), exclusive=True):
        pass  # to hold it is to finish it
    return 0


def is_left(facts: Mapping[str, Any]) -> bool:
    """Whether something is left of what a note speaks of: a partial output, or a change in place."""
    if facts.get("what") == "output":
        return bool(partials_of(Path(facts["out"])))
    return facts.get("what") == "change" and (Path(facts["folder"]) / JOURNAL).is_dir()


def _finding(facts: Mapping[str, Any]) -> Finding:
    by = f"a run that was killed (process {facts['process']['pid']})"
    if facts["what"] == "change":
        folder = Path(facts["folder"])
        way = "any loratool command on it, or 'loratool doctor --gc', finishes it or takes it back"
        return _leftover(folder / JOURNAL, f"{by} was changing {quoted(folder)} in place; {way}")
    partial = partials_of(Path(facts["out"]))[0]
    way = "'loratool doctor --gc' frees it, as does the same command again"
    return _leftover(partial, f"{by} left a part of {quoted(facts['out'])}; {way}")


def _leftover(path: Path, message: str) -> Finding:
    return Finding(kind="leftover", subject=path.name, path=path, message=message, size_bytes=size_of(path))


def _scratch() -> Iterator[Path]:
    """Small files in the home folder that were written, and not renamed in the moment after."""
    for pattern in SCRATCH:
        for file in sorted(home().glob(pattern)):
            with suppress(OSError):
                if time.time() - file.stat().st_mtime > SCRATCH_SECONDS:
                    yield file
