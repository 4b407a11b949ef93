"""Markdown in which text from outside cannot become markup."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from loratool.errors import printable

LONGEST: Final = 300
_SPECIAL: Final = re.compile(r"([\\`*_{}\[\]<>()#+!|~&$:])")


def plain(text: object) -> str:
    """Return Markdown that shows `text` literally, on one line."""
    return _SPECIAL.sub(r"\\\1", _line(text))


def code(text: object) -> str:
    """Return `text` as inline code, with enough backticks, for use in table cells too."""
    # A bar would end the cell, and a comment could imitate the mark that ends loratool's part of a README.
    line = _line(text).replace("|", "¦").replace("<!--", "<! --")
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    if longest == 0:
        return f"`{line}`"
    fence = "`" * (longest + 1)
    return f"{fence} {line} {fence}"


def table(rows: Iterable[tuple[str, str]], head: tuple[str, str] = ("", "")) -> str:
    """Return a table of two columns. Rows with an empty value are left out; without rows the result is empty."""
    lines = [f"| {key} | {value} |" for key, value in rows if value]
    return "\n".join([f"| {head[0]} | {head[1]} |", "| --- | --- |", *lines]) if lines else ""


def sections(*parts: str) -> str:
    """Join the nonempty parts with an empty line between them."""
    return "\n\n".join(part for part in parts if part)


def _line(text: object) -> str:
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
