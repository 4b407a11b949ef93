"""Checks of loratool's facts about an adapter (``loratool.json``, or ``loratool`` in a single file's metadata).

Facts record what the adapter is and came from: ``schema``, ``kind``, ``scaling``, ``base_fingerprint``, ``lineage``, ``recipe``,
``metrics``. They may come from a stranger, so nothing in them is run, opened or trusted. The checks accept only what loratool
writes, so that nothing else gets into a catalogue or onto a terminal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from loratool.errors import AdapterError, printable, quoted
from loratool.formats.kinds import COMPUTED
from loratool.formats.scaling_law import LAWS

SCHEMA: Final = 1
LARGEST_FACTS: Final = 1 << 20
"""Bytes as JSON."""

DEEPEST: Final = 32
MOST_PARENTS: Final = 64
LONGEST_NAME: Final = 200
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_OPERATION: Final = re.compile(r"[a-z][a-z_-]{0,31}")
_HARMLESS: Final = str.maketrans("", "", "\n\t\r\u200c\u200d")
"""Allowed control characters: line ends, and joiners of letters and emoji."""


FILES: Final = "files"
"""Key in the facts of an exported folder: its other files, which belong to the export and are replaced with it."""


@dataclass(frozen=True, slots=True)
class Parent:
    """A parent of an adapter, as recorded in its facts."""

    name: str
    sha256: str | None


def check_facts(facts: Mapping[str, Any], source: str) -> None:
    """Check that the facts of an adapter are what loratool writes; `source` names their file.

    Raises:
        AdapterError: they are too large or too deeply nested, contain control characters or impossible numbers, have a known
          key of another type, or are from a newer loratool.
    """
    reason = _why_wrong(facts)
    if reason is not None:
        raise AdapterError(
            f"{quoted(source)} is not what loratool writes: {reason}; ask whoever made it, or do not use it"
        )
    if isinstance(facts.get("schema"), int) and facts["schema"] > SCHEMA:
        raise AdapterError(
            f"{quoted(source)} was written by a newer loratool (schema {facts['schema']}); upgrade loratool"
        )


def with_files(facts: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the facts of an exported folder that has these other files."""
    return {**facts, FILES: sorted(names)}


def without_files(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts about an adapter, without the list of files of the folder that it was exported to."""
    return {key: value for key, value in facts.items() if key != FILES}


def lineage_of(facts: Mapping[str, Any]) -> tuple[str, tuple[Parent, ...], dict[str, Any]] | None:
    """Return the operation that made an adapter, its parents, and the operation's figures, from checked facts."""
    lineage = facts.get("lineage")
    if not isinstance(lineage, dict) or not lineage.get("parents"):
        return None
    parents = tuple(Parent(parent["name"], parent.get("sha256")) for parent in lineage["parents"])
    return lineage["operation"], parents, {k: v for k, v in lineage.items() if k not in {"operation", "parents"}}


def parents_of(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the recorded sha256 of the adapters that one was made from; ignore invalid records."""
    lineage = facts.get("lineage")
    parents = lineage.get("parents") if isinstance(lineage, Mapping) else None
    if not isinstance(parents, list):
        return ()
    found = [str(parent.get("sha256")) for parent in parents if isinstance(parent, Mapping)]
    return tuple(sorted(set(filter(_is_digest, found))))


def _why_wrong(facts: Mapping[str, Any]) -> str | None:
    if _depth(facts) > DEEPEST:
        return f"it is nested more than {DEEPEST} deep"
    if len(json.dumps(facts)) > LARGEST_FACTS:
        return f"it has more than {LARGEST_FACTS:,} bytes"
    odd = _odd_text(facts)
    if odd is not None:
        return f"it holds control characters in {quoted(odd, 40)}"
    for key, allowed in (("kind", COMPUTED), ("scaling", LAWS)):
        if key in facts and not (isinstance(facts[key], str) and facts[key] in allowed):
            return f"its {key} is {quoted(facts[key], 40)}"
    if "schema" in facts and type(facts["schema"]) is not int:
        return f"its schema is {quoted(facts['schema'], 40)}"
    if facts.get("base_fingerprint") is not None and not _is_digest(facts["base_fingerprint"]):
        return f"its base_fingerprint is {quoted(facts['base_fingerprint'], 40)}"
    for key in ("recipe", "metrics", "lineage"):
        if not isinstance(facts.get(key, {}), dict | None):
            return f"its {key} is not an object"
    return _why_no_lineage(facts.get("lineage") or {})


def _why_no_lineage(lineage: Mapping[str, Any]) -> str | None:
    parents = lineage.get("parents", [])
    if not isinstance(parents, list) or len(parents) > MOST_PARENTS:
        return f"its lineage is not a list of at most {MOST_PARENTS} parents"
    if parents and not (isinstance(lineage.get("operation"), str) and _OPERATION.fullmatch(lineage["operation"])):
        return f"the operation of its lineage is {quoted(lineage.get('operation'), 40)}"
    for parent in parents:
        named = isinstance(parent, dict) and isinstance(parent.get("name"), str) and len(parent["name"]) <= LONGEST_NAME
        if not named or (parent.get("sha256") is not None and not _is_digest(parent["sha256"])):
            return f"a parent in its lineage is {quoted(parent, 60)}"
    return None


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _depth(value: object) -> int:
    """Return how deep JSON is nested, up to just over the limit, without recursion."""
    depth, level = 0, [value]
    while level and depth <= DEEPEST:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, Mapping | list)
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
        ]
    return depth


def _odd_text(value: object) -> str | None:
    """Return a key or value in JSON with control characters that a terminal would interpret."""
    match value:
        case str():
            plain = value.translate(_HARMLESS)
            return None if printable(plain) == plain else value
        case Mapping():
            parts = [*value.keys(), *value.values()]
        case list():
            parts = value
        case _:
            return None
    return next((odd for part in parts if (odd := _odd_text(part)) is not None), None)
