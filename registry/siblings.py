"""Other catalogues that share the store: whether a SQLite file of one names any entry of the store."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from registry.places import is_gone

_ANY_ENTRY = "SELECT 1 FROM locations WHERE store_key IS NOT NULL LIMIT 1"


def names_nothing(path: Path) -> bool:
    """Whether the catalogue in the SQLite file at `path` certainly names no entry: it is gone, new, or has no such row.

    A file that cannot be read may name entries.
    """
    if is_gone(path):
        return True
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as connection:
            connection.execute("PRAGMA query_only = ON")
            tables = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'locations'").fetchone()
            return tables is None or connection.execute(_ANY_ENTRY).fetchone() is None
    except sqlite3.Error:
        return False
