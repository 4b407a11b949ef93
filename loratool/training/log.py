"""The log of a run, one JSON object per line: the recipe first, then each step, each evaluation, and the end."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from loratool.checkpoint.json_text import parse_json
from loratool.errors import OutputError, quoted


class Log:
    """A log that is appended to from byte `size` of `file` on. Later bytes, of steps lost in a kill, are cut off."""

    def __init__(self, file: Path, size: int = 0) -> None:
        self.file = file
        try:
            self._stream = open(file, "ab")  # noqa: SIM115 (closed by `__exit__`)
            self._stream.truncate(size)
        except OSError as error:
            raise _not_written(file, error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *ending: object) -> None:
        self._stream.close()

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one line. Numbers that are not finite become null.

        Raises:
            OutputError: the line cannot be written, for example because the disk is full.
        """
        try:
            self._stream.write((json.dumps(_plain(entry)) + "\n").encode())
            self._stream.flush()
        except OSError as error:
            raise _not_written(self.file, error) from None

    def synced(self) -> int:
        """Make all lines durable and return their size in bytes.

        Raises:
            OutputError: the lines cannot be written, for example because the disk is full.
        """
        try:
            os.fsync(self._stream.fileno())
            return os.fstat(self._stream.fileno()).st_size
        except OSError as error:
            raise _not_written(self.file, error) from None


def read_log(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a log up to the first incomplete one."""
    with open(file, "rb") as stream:
        for line in stream:
            try:
                entry = parse_json(line)
            except ValueError:
                return
            yield entry


def _plain(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return None
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return value


def _not_written(file: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {quoted(file)}: {error.strerror}; free some space")
