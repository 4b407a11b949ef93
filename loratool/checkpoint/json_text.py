"""JSON from outside, read with limits on its length, its nesting and the size of its numbers.

Every configuration, index, manifest, header and sidecar is read here. So a hostile file cannot take more memory than its kind
needs, and later code meets neither deeply nested lists nor numbers beyond a double.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any, Final

from loratool.checkpoint.file_type import LOOKED_AT, type_by_content
from loratool.errors import CheckpointError, quoted

LARGEST: Final = 16 << 20
"""Largest configuration, in bytes. The largest known, AdaLoRA's with masks for thousands of modules, has a third of that."""

LARGEST_LISTING: Final = 100_000_000
"""Largest listing of a model's tensors, in bytes: a header (by the format's own limit), index or manifest."""

DEEPEST: Final = 64
"""Largest depth of nesting. Real configurations have five or six levels."""

MOST_DIGITS: Final = 308
"""Largest number of digits of an integer. One with more digits is beyond the largest double."""

_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_LONG_NUMBER: Final = re.compile(rb"\d{%d}" % (MOST_DIGITS + 1))


def read_json_object(file: Path, largest: int = LARGEST) -> dict[str, Any]:
    """Return the JSON object in `file`, which has at most `largest` bytes.

    Raises:
        CheckpointError: it cannot be read, is not a regular file, is too large, or is not valid (`parse_json_object`).
    """
    try:
        return parse_json_object(read_limited(file, largest), file)
    except OSError as error:
        raise CheckpointError(f"cannot read {quoted(file)}: {error.strerror}") from None


def parse_json_object(text: bytes, file: Path) -> dict[str, Any]:
    """Return the JSON object in `text`, which must not have duplicate keys, NaN or infinity.

    Raises:
        CheckpointError: `text` is not such an object; the message names `file`.
    """
    try:
        value = parse_json(text)
    except ValueError as error:
        raise broken_file(file, _what_instead(text) or str(error)) from None
    if not isinstance(value, dict):
        raise broken_file(file, "its JSON is not an object")
    return value


def parse_json(text: bytes, deepest: int = DEEPEST) -> Any:
    """Return the JSON value in `text`, UTF-8 with or without a byte order mark.

    Raises:
        ValueError: it is not JSON, has a key twice, is nested more than `deepest` levels, or holds NaN, infinity, a number
            beyond the largest double, or half of a surrogate pair. The message says which.
    """
    whole_number = {"parse_int": _whole_number} if _LONG_NUMBER.search(text) else {}
    try:
        value = json.loads(
            text.removeprefix(_BYTE_ORDER_MARK).decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refused_constant,
            parse_float=_finite_number,
            **whole_number,  # type: ignore[arg-type]
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"its JSON is broken at line {error.lineno} ({error.msg})") from None
    except UnicodeDecodeError:
        raise ValueError("its JSON is not UTF-8") from None
    except RecursionError:
        raise ValueError(_too_deep(deepest)) from None
    _check_depth(value, deepest)
    if b"\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("its JSON holds half of a surrogate pair, which is no character") from None
    return value


def _what_instead(text: bytes) -> str | None:
    """Describe what a failed download left instead of JSON: a web page or a pointer; None if it is neither."""
    what = type_by_content(text[:LOOKED_AT]) if text.lstrip().startswith((b"<", b"version https://")) else None
    return None if what is None else f"it is {what.partition(';')[0]}"


def read_limited(file: Path, largest: int) -> bytes:
    """Return the content of a regular file of at most `largest` bytes.

    Raises:
        CheckpointError: it is not a regular file, or is larger.
        OSError: it cannot be read.
    """
    with open(file, "rb", opener=open_without_waiting) as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{quoted(file)} is not a regular file")
        content = stream.read(largest + 1)
    if len(content) > largest:
        raise CheckpointError(
            f"{quoted(file)} has {max(status.st_size, len(content)):,} bytes, and a file of its kind has at most "
            f"{largest:,}; it is not what its name says, so do not use it"
        )
    return content


def open_without_waiting(path: str, flags: int) -> int:
    """Open a file without waiting, as an `opener` for `open`: opening a FIFO would wait for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def broken_file(file: Path, reason: str) -> CheckpointError:
    """Return the error for a file that breaks a rule of its format, JSON or safetensors."""
    kind = "JSON" if file.suffix == ".json" else "safetensors"
    return CheckpointError(f"{quoted(file)} is not a valid {kind} file: {reason}; download or save it again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {quoted(twice)} occurs twice")
    return found


def _refused_constant(literal: str) -> None:
    raise ValueError(f"{literal} is not JSON")


def _finite_number(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"its JSON has the number {quoted(literal, 20)}, which is beyond the largest double")
    return value


def _whole_number(literal: str) -> int:
    if len(literal.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"its JSON has the number {quoted(literal, 20)}, which is beyond the largest double")
    return int(literal)


def _check_depth(value: object, deepest: int) -> None:
    """Raise ValueError if JSON is nested more than `deepest` levels; no recursion is used."""
    level = [value] if isinstance(value, dict | list) else []
    depth = 0
    while level:
        depth += 1
        if depth > deepest:
            raise ValueError(_too_deep(deepest))
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]


def _too_deep(deepest: int) -> str:
    return f"its JSON is nested more than {deepest} levels deep"
