"""Errors and notes on a terminal: wrapped between words; what is quoted, such as a command to copy, stays in one piece."""

from __future__ import annotations

import re
import shutil
import sys
from typing import Final

PIECE: Final = re.compile(r"(?:(?<!\w)'[^']*'(?!\w)|\S)+")
"""A word, or what stands in quotes with what touches it; an apostrophe is no quote."""


def on_stderr(text: str) -> str:
    """`text` as it is, or where stderr is a terminal wrapped to its width."""
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
