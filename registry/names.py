"""The one place that says which names the catalogue accepts.

A name has 1 to 96 characters: letters A-Z and a-z, digits, `.`, `_` and `-`, and begins with a letter or a digit.
`@` separates a version: `pirate@3`. Adapters, bases and tags all follow this rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from registry.errors import InvalidNameError

LONGEST_NAME = 96

_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class Reference:
    """An adapter as a person writes it: `name` (its newest version) or `name@version`."""

    name: str
    version: int | None = None

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


def printable(text: str, longest: int = 120) -> str:
    """`text` without control, formatting and other unprintable characters, cut to `longest` characters."""
    shown = "".join(character for character in text[: 4 * longest] if character.isprintable())
    return shown if len(shown) <= longest and len(text) <= 4 * longest else shown[: longest - 1] + "…"


def is_name(text: str) -> bool:
    """Whether `text` could be the name of an adapter, a base or a tag."""
    return _NAME.fullmatch(text) is not None


def check_name(text: str, what: str = "adapter") -> str:
    """`text` itself where it is a valid name; `what` is the noun for the error.

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
        reason = "it holds other characters"
    raise InvalidNameError(
        f"'{printable(text)}' is no valid {what} name ({reason}); use letters, digits, '.', '_' and '-', "
        f"beginning with a letter or a digit, {LONGEST_NAME} characters at most"
    )


def is_reference(text: str) -> bool:
    """Whether `text` could be `name` or `name@version`."""
    name, at, version = text.partition("@")
    return is_name(name) and (not at or _VERSION.fullmatch(version) is not None)


def parse_reference(text: str, what: str = "adapter") -> Reference:
    """Reads `name` or `name@version`; versions count from 1.

    Raises InvalidNameError.
    """
    name, at, version = text.partition("@")
    check_name(name, what)
    if not at:
        return Reference(name)
    if _VERSION.fullmatch(version) is None:
        raise InvalidNameError(
            f"'{printable(text)}' names no version; write a number after '@', counting from 1, as in '{name}@1'"
        )
    return Reference(name, int(version))


def nearest_names(name: str, known: Iterable[str]) -> tuple[str, ...]:
    """Up to three of the `known` names most like `name`, best first, whatever their case."""
    import difflib

    spelled: dict[str, str] = {}
    for candidate in sorted(known):
        spelled.setdefault(candidate.lower(), candidate)
    return tuple(spelled[match] for match in difflib.get_close_matches(name.lower(), spelled, n=3, cutoff=0.5))


def not_found_message(what: str, name: str, nearest: Sequence[str], command: str) -> str:
    """One sentence for a `what` that is not there: the nearest names, else the command that shows all of them."""
    missing = f"no {what} '{printable(name)}' is in the catalogue"
    if not nearest:
        return f"{missing}; see what is there with '{command}'"
    return f"{missing}; did you mean {' or '.join(repr(other) for other in nearest)}? ('{command}' shows all)"
