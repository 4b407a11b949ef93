"""The errors that a user can do something about.

A message is one sentence that says what is wrong, where, and what to do next. The command line prints it without a
traceback and exits with status 1.
"""

from __future__ import annotations

import difflib
import os
import reprlib
import shlex
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final


def printable(text: str) -> str:
    """Replace every control, format and surrogate character in `text`, which could control a terminal, by ``?``."""
    return "".join("?" if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"} else c for c in text)


_BRIEF: Final = reprlib.Repr()
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = _BRIEF.maxset = 12
_BRIEF.maxstring = 120
"""Shortened display of a list or an object from outside, however long or deep it is."""


def quoted(name: object, limit: int = 120) -> str:
    """Return a name from outside, safe to print: in quotes, printable, and cut to `limit` characters."""
    text = _BRIEF.repr(name) if isinstance(name, list | tuple | dict | set) else str(name)
    text = printable(text if len(text) <= limit else text[: limit - 1] + "…")
    return f"'{text}'"


def to_paste(command: str, path: str | os.PathLike[str], mark: str = "'") -> str:
    """Return a command between `mark`s for a shell, with `path` in the place of its word ``PATH``.

    A name that cannot be shown as it is stays ``PATH``, and is followed by how to give it.
    """
    text = os.fspath(path)
    if printable(text) != text:
        how = "its name has characters that cannot be shown: rename it, or give it by tab completion"
        return f"{mark}{command}{mark} (PATH: {how})"
    word = shlex.quote(f"./{text}" if text.startswith("-") else text)
    return f"{mark}{command.replace('PATH', word)}{mark}"


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> Sequence[str]:
    """Return up to `count` of the `candidates` that are most similar to `name`, best first."""
    return difflib.get_close_matches(name, list(candidates), n=count, cutoff=0.4)


class LoratoolError(Exception):
    """A problem that the user can fix. The message says what is wrong, where, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(printable(line) for line in message.split("\n")))


class CheckpointError(LoratoolError):
    """A model's folder or a safetensors file is damaged, incomplete or not what it claims to be."""


class AdapterError(LoratoolError):
    """An adapter file or its configuration cannot be used."""


class ElsewhereError(AdapterError):
    """There is no adapter at the given path, but there are some near it.

    Attributes:
        given: the path that was given.
        places: the paths of the adapters near it.
    """

    def __init__(self, message: str, given: Path, places: Sequence[Path]) -> None:
        super().__init__(message)
        self.given = given
        self.places = tuple(places)


class UnsupportedError(AdapterError):
    """An adapter uses a feature that loratool does not support. It is refused, never approximated."""


class DataError(LoratoolError):
    """A file of samples, or a line of one, cannot be used."""


class PlacementError(LoratoolError):
    """A tensor of an adapter lands on no tensor of the base, or on more than one."""


class WrongBaseError(LoratoolError):
    """An adapter belongs to another base model."""


class OutputError(LoratoolError):
    """An output exists already, cannot be written, or would overwrite its own input."""


class AlreadyMergedError(LoratoolError):
    """An adapter is already merged into the weights."""


class NoChangeError(LoratoolError):
    """A merge would change nothing."""


class RestoreError(LoratoolError):
    """A merge cannot be undone bit for bit with the files that are available."""


class VerificationError(LoratoolError):
    """Stored bytes differ from what the manifest records."""


class NotFoundError(LoratoolError):
    """A name, path or Hub id leads nowhere."""


class HubError(LoratoolError):
    """The Hugging Face Hub refuses, fails, or cannot be reached."""


class HubUnreachableError(HubError):
    """The Hugging Face Hub cannot be reached, or may not be asked."""
