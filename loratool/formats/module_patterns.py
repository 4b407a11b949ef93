"""Untrusted patterns of module names, matched as PEFT matches them, in limited time."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Final

import regex

from loratool.errors import AdapterError, quoted

MATCH_SECONDS: Final = 1.0
"""Time limit, in seconds, for matching an untrusted pattern against a module name."""

MOST_PATTERN_LETTERS: Final = 10_000
MOST_REPEATS: Final = 10_000
"""Limit of the product of the counts in a pattern, as in ``(a{100}){100}``. Compiling takes as much memory and has no timeout."""

_COUNTS: Final = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")


def matches(pattern: str, module: str, source: str, *, whole: bool) -> regex.Match[str] | None:
    """Match a module's name, or with `whole` false its beginning. `source` is the file of the pattern, for messages.

    Raises:
        AdapterError: the pattern is invalid or too large, or takes too long.
    """
    match = regex.fullmatch if whole else regex.match
    if len(pattern) > MOST_PATTERN_LETTERS or _repeats(pattern) > MOST_REPEATS:
        raise AdapterError(f"the pattern {quoted(pattern)} in {quoted(source)} is too large to match")
    try:
        re.compile(pattern)  # reject regex's own recursion, which PEFT's dialect lacks and no timeout bounds
        return match(pattern, module, timeout=MATCH_SECONDS)
    except TimeoutError:
        raise AdapterError(f"the pattern {quoted(pattern)} in {quoted(source)} takes too long to match") from None
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise AdapterError(f"{quoted(pattern)} in {quoted(source)} is not a valid pattern: {error}") from None


def pattern_key(patterns: Mapping[str, object], module: str, source: str) -> str:
    """Return the first pattern that matches the end of `module`, like ``peft.utils.get_pattern_key``; or else `module`."""
    for key in patterns:
        name = _whole_name(key)
        if module == name or (name is None and matches(rf"(.*\.)?({key})$", module, source, whole=False) is not None):
            return key
    return module


@lru_cache(4096)
def _whole_name(pattern: str) -> str | None:
    """Return the only module that `pattern` matches, if it is ``^`` and an escaped name, as `lora_config` writes it.

    An adapter with many ranks has such a pattern for each module, and matching all against all would take minutes.
    """
    name = re.sub(r"\\(.)", r"\1", pattern[1:])
    return name if pattern == f"^{re.escape(name)}" else None


def _repeats(pattern: str) -> int:
    """Return the product of all counts in a pattern."""
    return math.prod(max(1, int(count[:9] or 0)) for pair in _COUNTS.findall(pattern) for count in pair)
