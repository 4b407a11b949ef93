"""The name that an adapter or a base gets in the catalogue where the user gives none."""

from __future__ import annotations

import re
from pathlib import Path

from loratool.errors import AdapterError, quoted
from registry import is_name


def name_from(stem: str, source: Path) -> str:
    """A name for the catalogue made from a file's or folder's name."""
    if stem == "adapter_model":
        stem = source.resolve().parent.name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:96]
    if not is_name(name):
        raise AdapterError(f"no name can be made from {quoted(stem)}; give one with --name")
    return name
