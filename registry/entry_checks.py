"""Checks of the adapters and bases in labels before they become rows, since files may come from anywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from registry.names import is_name, printable

Entry = Mapping[str, Any]
"""An adapter or a base as JSON in the form of `registry.entries`, with every value checked."""


class LabelError(ValueError):
    """A label cannot be used; the message says why."""


_DIGEST = re.compile(r"[0-9a-f]{64}")
_LARGEST_INTEGER = 2**31 - 1
_LARGEST_SIZE = 2**62


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _text(longest: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and 0 < len(value) <= longest and "\0" not in value


def _number(largest: int, least: int = 0) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= largest


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _is_finite(value: Any) -> bool:
    """Whether a float can hold the number: an integer may be larger."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


def _is_table(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(of, value.values()))


def _is_list(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(of, value))


def _is_scaling(value: Any) -> bool:
    return _is_finite(value) or _is_table(_is_finite)(value)


def _is_targets(value: Any) -> bool:
    return isinstance(value, str) or _is_list(lambda name: isinstance(name, str))(value)


def _is_any_name(value: Any) -> bool:
    return isinstance(value, str) and is_name(value)


def _is_moment(value: Any) -> bool:
    """Whether it is a moment that the database can keep, which it does in UTC."""
    try:
        moment = datetime.fromisoformat(value)
        return moment.tzinfo is not None and moment.astimezone(UTC).year > 0
    except (TypeError, ValueError, OverflowError):
        return False


def _has(checks: Mapping[str, Callable[[Any], bool]]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(check(value.get(name)) for name, check in checks.items())


_is_object = _is_table(lambda value: True)
_LOCATION_CHECKS = {
    "kind": lambda value: value in ("path", "hub"),
    "path": _optional(_text(4096)),
    "repo": _optional(_text(255)),
    "revision": _optional(_text(255)),
    "path_in_repo": _optional(_text(4096)),
}
_PARENT_CHECKS = {
    "parent": _text(4096),
    "parent_sha256": _optional(_is_digest),
    "operation": _text(32),
    "details": _optional(_is_object),
    "created_at": _is_moment,
}
_ENTRY_CHECKS = {
    "name": _is_any_name,
    "version": _number(10**9 - 1, 1),
    "kind": _text(32),
    "sha256": _is_digest,
    "size_bytes": _number(_LARGEST_SIZE),
    "rank": _optional(_number(_LARGEST_INTEGER)),
    "ranks": _optional(_is_table(_number(_LARGEST_INTEGER))),
    "alpha": _optional(_is_finite),
    "scaling": _optional(_is_scaling),
    "target_modules": _optional(_is_targets),
    "dtype": _optional(_text(32)),
    "parameter_count": _optional(_number(_LARGEST_SIZE)),
    "base_fingerprint": _optional(_is_digest),
    "base_model": _optional(lambda value: isinstance(value, str) and "\0" not in value),
    "recipe": _optional(_is_object),
    "metrics": _optional(_is_object),
    "config": _optional(_is_object),
    "format": _optional(_text(32)),
    "tensor_count": _optional(_number(_LARGEST_INTEGER)),
    "family": _optional(_text(255)),
    "created_at": _is_moment,
    "base": _optional(_is_any_name),
    "base_source": _optional(_text(4096)),
    "tags": _is_list(_is_any_name),
    "locations": _is_list(_has(_LOCATION_CHECKS)),
    "parents": _is_list(_has(_PARENT_CHECKS)),
    "removed_at": _optional(_is_moment),
}
_NUMBERS_OF_ROWS = ("rank", "alpha", "parameter_count", "tensor_count")
_JSON_OF_ROWS = ("ranks", "target_modules", "recipe", "metrics", "config")
ROW_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    **{name: _ENTRY_CHECKS[name] for name in (*_NUMBERS_OF_ROWS, *_JSON_OF_ROWS)},
    # Rows hold the names of NaN and infinity, too.
    "scaling": lambda value: isinstance(value, (str, dict)) or _ENTRY_CHECKS["scaling"](value),
}
"""The checks of the columns of an adapter's row."""

_BASE_CHECKS = {
    "name": _is_any_name,
    "source": _text(4096),
    "revision": _optional(_text(255)),
    "path": _optional(_text(4096)),
    "fingerprint": _optional(_is_digest),
    "architecture": _optional(_text(255)),
    "model_type": _optional(_text(255)),
    "parameter_count": _optional(_number(_LARGEST_SIZE)),
    "size_bytes": _optional(_number(_LARGEST_SIZE)),
    "dtype": _optional(_text(32)),
    "created_at": _is_moment,
    "files": _optional(_is_object),
    "variant_of": _optional(_is_any_name),
}


def check_entry(value: object) -> Entry:
    """Return `value` if it is an adapter as JSON.

    Raises:
        LabelError: it is not; the message names the invalid fact.
    """
    return _checked(value, _ENTRY_CHECKS, "an adapter")


def check_base(value: object) -> Entry:
    """Return `value` if it is a base as JSON.

    Raises:
        LabelError: it is not; the message names the invalid fact.
    """
    return _checked(value, _BASE_CHECKS, "a base")


def shown(value: object) -> str:
    """Return a value from outside, cut, for a message."""
    try:
        return printable(str(value), 40)
    except ValueError:  # Python refuses to write an integer of thousands of digits
        return "a number of thousands of digits"


def _checked(value: object, checks: Mapping[str, Callable[[Any], bool]], what: str) -> Entry:
    if not isinstance(value, dict):
        raise LabelError(f"it holds '{shown(value)}' instead of {what}")
    for name, check in checks.items():
        if not check(value.get(name)):
            raise LabelError(f"its {name} is '{shown(value.get(name))}'")
    return value
