"""The names that the catalogue accepts for adapters, bases and tags.

A name has 1 to 96 characters: letters A-Z and a-z, digits, `.`, `_` and `-`. It begins with a letter or a digit.
`@` separates a version, as in `pirate@3`.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from registry.errors import InvalidNameError

LONGEST_NAME = 96

_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference to an adapter: `name` (its newest version) or `name@version`."""

    name: str
    version: int | None = None

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


def printable(text: str, longest: int = 120) -> str:
    """Return `text` without control, formatting and other unprintable characters, cut to `longest` characters."""
    shown = "".join(character for character in text[: 4 * longest] if character.isprintable())
    return shown if len(shown) <= longest and len(text) <= 4 * longest else shown[: longest - 1] + "…"


def to_paste(command: str, path: str | os.PathLike[str], mark: str = "'") -> str:
    """Return a command between `mark`s for a shell, with `path` in the place of its word ``PATH``.

    A name that cannot be shown as it is stays ``PATH``, and is followed by how to give it.
    """
    text = os.fspath(path)
    if printable(text, 4096) != text:
        how = "its name has characters that cannot be shown: rename it, or give it by tab completion"
        return f"{mark}{command}{mark} (PATH: {how})"
    word = shlex.quote(f"./{text}" if text.startswith("-") else text)
    return f"{mark}{command.replace('PATH', word)}{mark}"


def is_name(text: str) -> bool:
    """Whether `text` could be the name of an adapter, a base or a tag."""
    return _NAME.fullmatch(text) is not None


def check_name(text: str, what: str = "adapter") -> str:
    """Return `text` if it is a valid name. `what` is the noun for the error.

    Raises InvalidNameError.
    """
    if is_name(text):
        return text
    if not text:
        reason = "it is empty"
    elif len(text) > LONGEST_NAME:
        reason = f"it has {len(text)} characters"
    elif not text[0].isascii() or not text[0].isalnum():
        reason = "it does not begin with a letter (A-Z, a-z) or a digit"
    else:
        reason = "it has other characters"
    raise InvalidNameError(
        f"'{printable(text)}' is not a valid {what} name ({reason}); use letters, digits, '.', '_' and '-', "
        f"beginning with a letter or a digit, {LONGEST_NAME} characters at most"
    )


def is_reference(text: str) -> bool:
    """Whether `text` could be `name` or `name@version`."""
    name, at, version = text.partition("@")
    return is_name(name) and (not at or _VERSION.fullmatch(version) is not None)


def parse_reference(text: str, what: str = "adapter") -> Reference:
    """Parse `name` or `name@version`. Versions count from 1.

    Raises InvalidNameError.
    """
    name, at, version = text.partition("@")
    check_name(name, what)
    if not at:
        return Reference(name)
    if _VERSION.fullmatch(version) is None:
        raise InvalidNameError(
            f"'{printable(text)}' has an invalid version; write a number from 1 after '@', as in '{name}@1'"
        )
    return Reference(name, int(version))


def nearest_names(name: str, known: Iterable[str]) -> tuple[str, ...]:
    """Return up to three of the `known` names most similar to `name`, best first. Case is ignored."""
    import difflib

    spelled: dict[str, str] = {}
    for candidate in sorted(known):
        spelled.setdefault(candidate.lower(), candidate)
    return tuple(spelled[match] for match in difflib.get_close_matches(name.lower(), spelled, n=3, cutoff=0.5))


def not_found_message(what: str, name: str, nearest: Sequence[str], command: str) -> str:
    """Return the message for a missing `what`: with the nearest names, or the command that lists all."""
    missing = f"no {what} '{printable(name)}' is in the catalogue"
    if not nearest:
        return f"{missing}; see what is there with '{command}'"
    return f"{missing}; did you mean {' or '.join(repr(other) for other in nearest)}? ('{command}' shows all)"
