"""The catalogue of adapters and base models: their files, their lineage, and the merges made from them.

    from registry import Registry, home

    with Registry.open(home()) as registry:
        record, new = registry.adapters.add("pirate", facts, tags=["speech"])
        registry.adapters.find("pirate@1")

This package imports neither torch nor loratool. `Registry` is imported on first use, so that names, places and the list of
adapters need no SQLAlchemy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.backups import Backup
from registry.errors import (
    AlreadyExistsError,
    InUseError,
    InvalidNameError,
    NotFoundError,
    NotSureError,
    RegistryBusyError,
    RegistryDamagedError,
    RegistryError,
    RegistryFullError,
    RegistryReadOnlyError,
    RegistryUnwritableError,
    SchemaTooNewError,
)
from registry.listing import SortKey, quick_fetch, select_adapters
from registry.names import Reference, check_name, is_name, is_reference, parse_reference, printable
from registry.places import DATABASE_NAME, home, registry_url
from registry.records import (
    AdapterFacts,
    AdapterRecord,
    AdapterSummary,
    BaseRecord,
    Counts,
    Finding,
    Freed,
    LineageRecord,
    Location,
    MergedAdapter,
    MergeRecord,
    MergeState,
    ModelFacts,
    Rebuilt,
    RemovedAdapter,
    uncatalogued,
)

if TYPE_CHECKING:
    from registry.catalogue import Registry

__all__ = [
    "AdapterFacts",
    "AdapterRecord",
    "AdapterSummary",
    "AlreadyExistsError",
    "Backup",
    "BaseRecord",
    "Counts",
    "Finding",
    "Freed",
    "InUseError",
    "InvalidNameError",
    "LineageRecord",
    "Location",
    "MergeRecord",
    "MergeState",
    "MergedAdapter",
    "ModelFacts",
    "NotFoundError",
    "NotSureError",
    "Rebuilt",
    "Reference",
    "Registry",
    "RegistryBusyError",
    "RegistryDamagedError",
    "RegistryError",
    "RegistryFullError",
    "RegistryReadOnlyError",
    "RegistryUnwritableError",
    "RemovedAdapter",
    "SchemaTooNewError",
    "SortKey",
    "check_name",
    "home",
    "is_name",
    "is_reference",
    "list_adapters",
    "parse_reference",
    "printable",
    "registry_url",
    "uncatalogued",
]


def list_adapters(
    home: Path,
    url: str | None = None,
    *,
    base: str | None = None,
    kind: str | None = None,
    tag: str | None = None,
    sort: SortKey = "name",
) -> tuple[AdapterSummary, ...]:
    """Return what `Registry.open(home, url, read_only=True).adapters.list(...)` does, without importing SQLAlchemy.

    Raises RegistryError.
    """
    tables = quick_fetch(home / DATABASE_NAME) if url is None else None
    if tables is not None:
        return select_adapters(tables, base=base, kind=kind, tag=tag, sort=sort)
    from registry.catalogue import Registry

    with Registry.open(home, url, read_only=True) as registry:
        return registry.adapters.list(base=base, kind=kind, tag=tag, sort=sort)


def __getattr__(name: str) -> Any:
    if name == "Registry":
        from registry.catalogue import Registry

        return Registry
    raise AttributeError(f"module 'registry' has no attribute {name!r}")
