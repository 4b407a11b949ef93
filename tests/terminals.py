"""loratool on a terminal of so many columns, and what it prints there."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from pathlib import Path

from rich.cells import cell_len

REPOSITORY = Path(__file__).parents[1]
END = b"\x04end\x04"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")


def terminal(*words: str | Path, columns: int = 80, environment: Mapping[str, str] | None = None, typed: str = "",
             status: int = 0) -> str:  # fmt: skip
    """What ``loratool WORDS...`` prints on a terminal of so many columns, escape sequences and all; it ends with `status`."""
    mine, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    variables = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES", "NO_COLOR"}}
    child = subprocess.Popen(
        [sys.executable, "-m", "loratool", *map(str, words)],
        stdin=its,
        stdout=its,
        stderr=its,
        cwd=REPOSITORY,
        env={**variables, "TERM": "xterm-256color", **(environment or {})},
    )
    os.write(mine, typed.encode())
    printed = printed_until_the_end(mine, its, child)
    os.close(mine)
    os.close(its)
    assert child.wait() == status, printed.decode()
    return printed.decode().replace("\r\n", "\n")


def printed_until_the_end(mine: int, its: int, child: subprocess.Popen[bytes]) -> bytes:
    """All that the child prints. The terminal stays open after it, and a mark is written there last: a terminal that is closed
    may lose what was not read yet."""
    printed, marked = b"", False
    while not printed.endswith(END):
        if not marked and child.poll() is not None:
            os.write(its, END)
            marked = True
        if select.select([mine], [], [], 0.02)[0]:
            printed += os.read(mine, 65536)
    return printed.removesuffix(END)


def assert_fits(printed: str, columns: int = 80) -> list[str]:
    """Every line is at most so many cells wide; the lines without their escape sequences."""
    lines = ESCAPES.sub("", printed).splitlines()
    for line in lines:
        assert cell_len(line) <= columns, line
        assert line.isprintable()
    return lines
