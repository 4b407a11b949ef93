"""`loratool.tag`: words to find an adapter by."""

from __future__ import annotations

import os
from collections.abc import Sequence

from loratool.library.recording.opening import open_registry
from loratool.library.resolving.adapter_entry import adapter_entry
from registry import AdapterRecord


def tag(adapter: str | os.PathLike[str], tags: Sequence[str], *, remove: bool = False,
        registry: str | None = None) -> AdapterRecord:  # fmt: skip
    """Add tags to an adapter, or remove them; return its new entry.

    Args:
        adapter: ``name`` (its newest version), ``name@version``, or the path or Hub id of a catalogued adapter.
        tags: names; tags that it has already stay.
        remove: remove the tags.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.

    Raises:
        registry.RegistryError: there is no such adapter, a tag is not a valid name, or a tag to remove does not exist.
    """
    with open_registry(registry) as catalogue:
        change = catalogue.adapters.untag if remove else catalogue.adapters.tag
        return change(adapter_entry(os.fspath(adapter), catalogue).reference, *tags)
