"""Remains of killed runs, anywhere on disk: partial outputs, unfinished changes in place, scratch files in the home folder."""

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
from loratool.library.places.home_folder import RUNNING
from loratool.library.places.training_run import abandoned_runs, clear_run
from registry import Finding, home

KINDS: Final = ("output", "change")
"""Kinds of notes whose runs can leave remains on the disk."""

SCRATCH: Final = ("digests/*.tmp", f"{RUNNING}/*{DRAFT_SUFFIX}")
SCRATCH_SECONDS: Final = 3600.0
"""Age in seconds above which a scratch file, which is written in a moment, was left by a killed run."""


def find_leftovers() -> tuple[Finding, ...]:
    """Return one finding for each of the remains of killed runs."""
    with taken_over(home() / RUNNING) as notes:
        found = [_finding(note.facts) for note in notes if is_left(note.facts)]
    way = "was left by a run that was killed; 'loratool doctor --gc' frees it"
    return (*found, *(_leftover(path, f"{quoted(path)} {way}") for path in (*abandoned_runs(), *_scratch())))


def clear_leftovers() -> tuple[int, int]:
    """Remove the remains of killed runs, finish or discard their changes in place, and return their number and bytes."""
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
    """Remove a partial output, or finish or discard a change in place; return the bytes freed."""
    if facts["what"] == "output":
        return clear_partials(Path(facts["out"]))
    with suppress(LoratoolError), locked(Path(facts["folder"]), exclusive=True):
        pass  # locking the folder finishes or discards the change
    return 0


def is_left(facts: Mapping[str, Any]) -> bool:
    """Return whether remains of a note's run exist: a partial output, or an unfinished change in place."""
    if facts.get("what") == "output":
        return bool(partials_of(Path(facts["out"])))
    return facts.get("what") == "change" and (Path(facts["folder"]) / JOURNAL).is_dir()


def _finding(facts: Mapping[str, Any]) -> Finding:
    by = f"a run that was killed (process {facts['process']['pid']})"
    if facts["what"] == "change":
        folder = Path(facts["folder"])
        way = "any loratool command on it, or 'loratool doctor --gc', finishes or discards the change"
        return _leftover(folder / JOURNAL, f"{by} was changing {quoted(folder)} in place; {way}")
    partial = partials_of(Path(facts["out"]))[0]
    way = "'loratool doctor --gc' frees it, as does the same command again"
    return _leftover(partial, f"{by} left a part of {quoted(facts['out'])}; {way}")


def _leftover(path: Path, message: str) -> Finding:
    return Finding(kind="leftover", subject=path.name, path=path, message=message, size_bytes=size_of(path))


def _scratch() -> Iterator[Path]:
    """Yield temporary files in the home folder that are too old to be in use."""
    for pattern in SCRATCH:
        for file in sorted(home().glob(pattern)):
            with suppress(OSError):
                if time.time() - file.stat().st_mtime > SCRATCH_SECONDS:
                    yield file
