"""`loratool.list`: the catalogued adapters, by base, kind or tag. It imports neither torch nor SQLAlchemy."""

from __future__ import annotations

import os
from pathlib import Path

from registry import AdapterSummary, SortKey, home, is_name, registry_url
from registry import list_adapters as list_catalogued


def list_adapters(*, base: str | os.PathLike[str] | None = None, kind: str | None = None, tag: str | None = None,
                  sort: SortKey = "name", registry: str | None = None) -> tuple[AdapterSummary, ...]:  # fmt: skip
    """Return the catalogued adapters that pass every filter.

    Args:
        base: only adapters of this base and of its variants: a catalogued name, a folder or a Hub id.
        kind: only adapters of this kind, by its name in `loratool.formats.kinds`.
        tag: only adapters with this tag.
        sort: ``name`` (then version), ``kind`` or ``base``; ``rank``, ``alpha`` or ``size_bytes``, largest first; or
            ``created_at``, newest first.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.

    Raises:
        registry.RegistryError: the catalogue cannot be read, or `base` is not in it.
    """
    url = registry or registry_url()
    name = None if base is None else os.fspath(base)
    if name is not None and (not is_name(name) or Path(name).exists()):
        name = _base_name(name, registry)
    found = list_catalogued(home(), url, base=name, kind=kind, tag=tag, sort=sort)
    if not found:
        _say_if_lost(registry)
    return found


def _say_if_lost(registry: str | None) -> None:
    """Print a warning if the catalogue is empty but the store is not."""
    from loratool.library.recording.opening import open_registry

    with open_registry(registry, read_only=True, settled=False):
        pass


def _base_name(base: str, registry: str | None) -> str:
    """Return the name of the catalogued base that a folder or a Hub id refers to."""
    from loratool.library.recording.opening import open_registry
    from loratool.library.resolving.base_entry import base_entry

    with open_registry(registry, read_only=True) as catalogue:
        return base_entry(base, catalogue).name
