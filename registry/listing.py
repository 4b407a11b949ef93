"""The list of adapters. The default SQLite file is read without SQLAlchemy, whose import takes most of the command's time.

The statements are plain SQL that every database understands, so that both ways share them. Filtering and sorting happen here,
so that both give the same list.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from registry import notices
from registry.errors import NotFoundError, RegistryError
from registry.families import relatives
from registry.json_text import json_value
from registry.names import nearest_names, not_found_message, printable
from registry.records import AdapterSummary
from registry.version import HEAD, VERSION_TABLE

SortKey = Literal["name", "kind", "rank", "alpha", "base", "size_bytes", "created_at"]

_ADAPTERS = (
    "SELECT a.id, a.name, a.version, a.kind, a.sha256, a.rank, a.alpha, a.target_modules, a.dtype, a.size_bytes, "
    "a.parameter_count, a.base_id, a.base_fingerprint, a.base_model, a.created_at FROM adapters a ORDER BY a.id"
)
_TAGS = "SELECT t.adapter_id, t.tag FROM tags t ORDER BY t.adapter_id, t.tag"
_BASES = "SELECT b.id, b.variant_of, b.fingerprint, b.name FROM bases b ORDER BY b.id"

STATEMENTS = (_ADAPTERS, _TAGS, _BASES)

Rows = Sequence[Sequence[Any]]


def quick_fetch(path: Path, timeout: float = 10.0) -> list[Rows] | None:
    """Return the rows of each of STATEMENTS from an up-to-date SQLite catalogue, in one snapshot.

    Return None if the file is anything else or cannot be read so. `Registry.open` then migrates it or reports the error.
    """
    if not path.is_file():
        return None
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=timeout)) as connection:
            connection.isolation_level = None
            connection.execute("PRAGMA query_only = ON")
            connection.execute("BEGIN")
            if connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone() != (HEAD,):
                return None
            adapters, tags, bases = (connection.execute(statement).fetchall() for statement in STATEMENTS)
        return [decoded(adapters), tags, bases]
    except (sqlite3.Error, ValueError, TypeError):
        return None


def decoded(rows: Rows) -> Rows:
    """Return SQLite's rows of adapters with their values parsed. Damaged rows are left out, with a note that names them."""
    sound, damaged = [], []
    for row in rows:
        try:
            sound.append(_decoded(row))
        except (ValueError, TypeError, AttributeError):
            damaged.append(f"{row[1]}@{row[2]}")
    if damaged:
        names = printable(", ".join(damaged), 400)
        notices.say(f"left out {names}, whose row in the registry is damaged; 'loratool doctor' says what to do")
    return sound


def _decoded(row: Sequence[Any]) -> tuple[Any, ...]:
    """Return a SQLite row of adapters with its JSON and time parsed, as SQLAlchemy's column types do."""
    targets, created_at = row[7], row[14]
    return (
        *row[:7],
        None if targets is None else json_value(targets),
        *row[8:14],
        datetime.fromisoformat(created_at).replace(tzinfo=UTC),
    )


def select_adapters(
    tables: Sequence[Rows],
    *,
    base: str | None = None,
    kind: str | None = None,
    tag: str | None = None,
    sort: SortKey = "name",
) -> tuple[AdapterSummary, ...]:
    """Return the adapters that pass every given filter, sorted. `tables` holds the rows of each of STATEMENTS.

    `base` selects the adapters of that base and of its variants. Names, kinds and bases sort ascending; rank, alpha, size and
    time sort descending. Unknown values come last.

    Raises NotFoundError for an unknown `base`, RegistryError for an unknown `sort`.
    """
    if sort not in get_args(SortKey):
        raise RegistryError(
            f"adapters cannot be sorted by '{printable(sort)}'; sort by one of {', '.join(get_args(SortKey))}"
        )
    adapter_rows, tag_rows, base_rows = tables
    wanted = _of_base(base, base_rows)
    tags: dict[int, list[str]] = {}
    for adapter_id, name in tag_rows:
        tags.setdefault(adapter_id, []).append(name)
    names = {row[0]: row[3] for row in base_rows}
    found = [
        _summary(row, tuple(tags.get(row[0], ())), names)
        for row in adapter_rows
        if (kind is None or row[3] == kind) and (tag is None or tag in tags.get(row[0], ())) and wanted(row)
    ]
    return tuple(_sorted(found, sort))


def _of_base(base: str | None, base_rows: Rows) -> Callable[[Sequence[Any]], bool]:
    if base is None:
        return lambda row: True
    ids = {row[3]: row[0] for row in base_rows}
    if base not in ids:
        nearest = nearest_names(base, ids)
        raise NotFoundError(not_found_message("base", base, nearest, "loratool base list"), nearest)
    family = relatives([(row[0], row[1], row[2]) for row in base_rows], base_id=ids[base])
    return lambda row: row[11] in family.ids or row[12] in family.fingerprints


def _summary(row: Sequence[Any], tags: tuple[str, ...], bases: dict[int, str]) -> AdapterSummary:
    return AdapterSummary(
        id=row[0],
        name=row[1],
        version=row[2],
        kind=row[3],
        sha256=row[4],
        rank=row[5],
        alpha=row[6],
        target_modules=row[7],
        dtype=row[8],
        size_bytes=row[9],
        parameter_count=row[10],
        base=bases.get(row[11]),
        base_fingerprint=row[12],
        base_model=row[13],
        tags=tags,
        created_at=row[14],
    )


def _sorted(found: list[AdapterSummary], sort: SortKey) -> list[AdapterSummary]:
    found.sort(key=lambda adapter: (adapter.name.casefold(), adapter.name, adapter.version))
    if sort == "name":
        return found
    known = [adapter for adapter in found if getattr(adapter, sort) is not None]
    unknown = [adapter for adapter in found if getattr(adapter, sort) is None]
    known.sort(key=lambda adapter: getattr(adapter, sort), reverse=sort not in ("kind", "base"))
    return known + unknown
