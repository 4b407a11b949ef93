"""JSON in the database, with bounds on its length and its depth."""

from __future__ import annotations

import json
from typing import Any

from registry.errors import RegistryError

LARGEST_JSON = 16 << 20
"""The largest number of characters in one value. A configuration with masks for thousands of modules has a third of that."""

DEEPEST_JSON = 64


def json_text(value: Any) -> str:
    """Return `value` as JSON text. Raises RegistryError if it is too large, nested too deep, or not JSON."""
    try:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise RegistryError(_refusal("is nested too deep")) from None
    except (TypeError, ValueError) as error:
        raise RegistryError(_refusal(f"is not JSON ({error})")) from None
    if len(text) > LARGEST_JSON:
        raise RegistryError(_refusal(f"has {len(text):,} characters of JSON, more than {LARGEST_JSON:,}"))
    if is_too_deep(value):
        raise RegistryError(_refusal(f"is nested more than {DEEPEST_JSON} levels deep"))
    return text


def json_value(text: str) -> Any:
    """Return the value of JSON text. Raises ValueError if it is too large, nested too deep, or not JSON."""
    if len(text) > LARGEST_JSON:
        raise ValueError(f"{len(text):,} characters of JSON")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None
    if is_too_deep(value):
        raise ValueError("JSON that is nested too deep")
    return value


def is_too_deep(value: object) -> bool:
    """Whether a value is nested more than `DEEPEST_JSON` levels deep, counted without recursion."""
    level = [value]
    for _ in range(DEEPEST_JSON + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list, tuple))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _refusal(reason: str) -> str:
    return f"a configuration or recipe {reason}; it cannot be catalogued: make it smaller, or leave it out"
