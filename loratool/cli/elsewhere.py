"""What to type instead, where a path on the command line holds no adapter and others near it do."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from loratool.errors import ElsewhereError
from loratool.library.user_path import user_path

MOST_SHOWN: Final = 3
"""Of more places the last: of a training's checkpoints the newest."""


def commands_instead(error: Exception, words: Sequence[str]) -> list[str]:
    """Return the command line of these `words` with each of the places that an error names in the place of the one given.

    None for other errors, or where no word is that place.
    """
    if not isinstance(error, ElsewhereError):
        return []
    found = next(_naming(error.given, words), None)
    if found is None:
        return []
    at, before, after = found
    return [
        shlex.join(["loratool", *words[:at], f"{before}{place}{after}", *words[at + 1 :]])
        for place in error.places[-MOST_SHOWN:]
    ]


def _naming(given: Path, words: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Each word that names the place: where it stands, and what it has before and behind that (``--out=``, ``=0.5``)."""
    for at, word in enumerate(words):
        option, sign, value = word.partition("=") if word.startswith("--") else ("", "", word)
        name, equals, weight = value.rpartition("=")
        for path, rest in ((value, ""), (name, f"={weight}") if equals else (value, "")):
            if path and user_path(path) == given:
                yield at, f"{option}{sign}", rest
