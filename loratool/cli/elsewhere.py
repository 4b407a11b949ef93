"""Corrected command lines for a path that holds no adapter while others near it do."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from loratool.errors import ElsewhereError, printable
from loratool.library.places.user_path import user_path

MOST_SHOWN: Final = 3
"""The number of places to show. They are the last, which for the checkpoints of a training are the newest."""


def commands_instead(error: Exception, words: Sequence[str]) -> list[str]:
    """Return the command line `words` once for each place that the error names, with that place instead of the given path.

    The list is empty for other errors, or if no word is the given path.
    """
    if not isinstance(error, ElsewhereError):
        return []
    found = next(_naming(error.given, words), None)
    if found is None:
        return []
    at, before, after = found
    lines = [
        shlex.join(["loratool", *words[:at], f"{before}{place}{after}", *words[at + 1 :]])
        for place in error.places[-MOST_SHOWN:]
    ]
    return [line for line in lines if printable(line) == line]  # another could not be pasted


def _naming(given: Path, words: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Yield each word that holds the path: its position, and the text before and after the path (``--out=``, ``=0.5``)."""
    for at, word in enumerate(words):
        option, sign, value = word.partition("=") if word.startswith("--") else ("", "", word)
        name, equals, weight = value.rpartition("=")
        for path, rest in ((value, ""), (name, f"={weight}") if equals else (value, "")):
            if path and user_path(path) == given:
                yield at, f"{option}{sign}", rest
