"""Markdown in which no name from outside is more than a name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from loratool.errors import printable

LONGEST: Final = 300
_SPECIAL: Final = re.compile(r"([\\`*_{}\[\]<>()#+!|~&$:])")


def plain(text: object) -> str:
    """`text` as Markdown that shows it letter by letter, on one line."""
    return _SPECIAL.sub(r"\\\1", _line(text))


def code(text: object) -> str:
    """`text` between backticks, as many as it takes; fit for the cell of a table."""
    # A bar would end the cell, and a comment might be the mark at the end of loratool's part.
    line = _line(text).replace("|", "¦").replace("<!--", "<! --")
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    if longest == 0:
        return f"`{line}`"
    fence = "`" * (longest + 1)
    return f"{fence} {line} {fence}"


def table(rows: Iterable[tuple[str, str]], head: tuple[str, str] = ("", "")) -> str:
    """A table of two columns of Markdown; rows that say nothing are left out. Empty where none is left."""
    lines = [f"| {key} | {value} |" for key, value in rows if value]
    return "\n".join([f"| {head[0]} | {head[1]} |", "| --- | --- |", *lines]) if lines else ""


def sections(*parts: str) -> str:
    """The parts that say something, with an empty line between them."""
    return "\n\n".join(part for part in parts if part)


def _line(text: object) -> str:
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
