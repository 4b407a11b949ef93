"""Resolution of a name for samples: a file, or a data set of the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from loratool.library.places.user_path import exists, is_plainly_a_path, user_path
from loratool.running.data import KEYS, SUFFIXES, Data, read_data, read_rows

DATA_SET: Final = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.\[\]:%+-]+))?", re.ASCII
)


def resolve_data(name: str | os.PathLike[str]) -> Data:
    """Read a file of samples, or a data set of the Hub: ``owner/name``, ``owner/name:split``, ``owner/name@revision:split``.

    Raises:
        NotFoundError: it is neither.
        DataError: it cannot be read, or a line or row is not a sample; the message names it.
    """
    text = os.fspath(name)
    path = user_path(text)
    of_hub = None if is_plainly_a_path(text) or path.suffix.lower() in SUFFIXES else DATA_SET.fullmatch(text)
    if of_hub is None or exists(path):
        return read_data(path)
    from loratool.hub.data_sets import fetch_table

    table = fetch_table(of_hub["repo"], of_hub["split"], columns=KEYS, revision=of_hub["revision"])
    return read_rows(Path(text), table.columns, table.rows)
