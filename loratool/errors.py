"""The errors that loratool raises for reasons a user can do something about.

Every message is one sentence that says what is wrong, where, and what to do next. The command line prints it
without a traceback and exits with status 1.
"""

from __future__ import annotations

import difflib
import reprlib
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final


def printable(text: str) -> str:
    """`text` with everything that could drive a terminal (control, format and surrogate characters) shown as ``?``."""
    return "".join("?" if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"} else c for c in text)


_BRIEF: Final = reprlib.Repr()
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = _BRIEF.maxset = 12
_BRIEF.maxstring = 120
"""How a list or an object from outside is shown: never whole, however long or deep it is."""


def quoted(name: object, limit: int = 120) -> str:
    """A name from outside, safe to print: quoted, printable, and at most `limit` characters long."""
    text = _BRIEF.repr(name) if isinstance(name, list | tuple | dict | set) else str(name)
    text = printable(text if len(text) <= limit else text[: limit - 1] + "…")
    return f"'{text}'"


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> Sequence[str]:
    """Up to `count` of `candidates` that look most like `name`, best first."""
    return difflib.get_close_matches(name, list(candidates), n=count, cutoff=0.4)


class LoratoolError(Exception):
    """Something is wrong that the user can mend; the message says what, where and how."""

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(printable(line) for line in message.split("\n")))


class CheckpointError(LoratoolError):
    """A model folder or safetensors file is damaged, incomplete or lies about its content."""


class AdapterError(LoratoolError):
    """An adapter file or its configuration cannot be used."""


class ElsewhereError(AdapterError):
    """No adapter is where one was looked for, but there are some near it.

    `given` is where was looked, `places` where they are.
    """

    def __init__(self, message: str, given: Path, places: Sequence[Path]) -> None:
        super().__init__(message)
        self.given = given
        self.places = tuple(places)


class UnsupportedError(AdapterError):
    """An adapter uses a feature whose numbers loratool does not compute yet; it is refused, never approximated."""


class DataError(LoratoolError):
    """A file of samples, or a line of one, cannot be used."""


class PlacementError(LoratoolError):
    """A tensor of an adapter lands on no tensor of the base, or on more than one."""


class WrongBaseError(LoratoolError):
    """An adapter belongs to another base model."""


class OutputError(LoratoolError):
    """An output exists already, cannot be written, or would overwrite its own input."""


class AlreadyMergedError(LoratoolError):
    """An adapter is in the weights already that it is to be merged into."""


class NoChangeError(LoratoolError):
    """A merge would change nothing."""


class RestoreError(LoratoolError):
    """A merge cannot be undone bit for bit with what is at hand."""


class VerificationError(LoratoolError):
    """Stored bytes differ from what the manifest says they are."""


class NotFoundError(LoratoolError):
    """A name, path or Hub id leads nowhere."""


class HubError(LoratoolError):
    """The Hugging Face Hub refuses, fails, or cannot be reached."""
