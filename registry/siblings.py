"""Other catalogues that share the store: whether a SQLite file of one names any entry of the store."""

from __future__ import annotations

import sqlite3
import stat
from contextlib import closing, suppress
from pathlib import Path

from registry.places import is_gone

_TABLES = ("locations", "removed_adapters")
"""The tables whose rows may name an entry; a catalogue that was not opened for long lacks the trash."""


def names_nothing(path: Path) -> bool:
    """Whether the catalogue in the SQLite file at `path` certainly names no entry: it is gone, new, or has no such row.

    A file that cannot be read may name entries.
    """
    if is_gone(path):
        return True
    with suppress(OSError):
        if not stat.S_ISREG(path.stat().st_mode):
            return False  # SQLite would wait for a pipe
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as connection:
            connection.execute("PRAGMA query_only = ON")
            present = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            queries = [
                f"SELECT 1 FROM {table} WHERE store_key IS NOT NULL LIMIT 1" for table in _TABLES if table in present
            ]
            return not any(connection.execute(query).fetchone() for query in queries)
    except sqlite3.Error:
        return False
