"""Wrapping of errors and notes on a terminal. Quoted text, such as a command to copy, stays on one line."""

from __future__ import annotations

import re
import shutil
import sys
from typing import Final

PIECE: Final = re.compile(r"(?:(?<!\w)'[^']*'(?!\w)|\S)+")
"""A word, or a quoted text with the characters that touch it. An apostrophe inside a word is not a quote."""


def on_stderr(text: str) -> str:
    """Return `text`, wrapped to the width of the terminal if stderr is one."""
    if not sys.stderr.isatty():
        return text
    columns = shutil.get_terminal_size().columns
    return "\n".join(_wrapped(line, columns) for line in text.split("\n"))


def _wrapped(line: str, columns: int) -> str:
    if len(line) <= columns:
        return line
    lines = [""]
    for piece in PIECE.findall(line):
        longer = f"{lines[-1]} {piece}" if lines[-1] else piece
        if lines[-1] and len(longer) > columns:
            lines.append(piece)
        else:
            lines[-1] = longer
    return "\n".join(lines)
