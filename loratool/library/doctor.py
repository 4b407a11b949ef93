"""`loratool.doctor`: the catalogue against the disk."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loratool.library.leftovers import clear_leftovers, find_leftovers
from loratool.library.opening import open_registry
from registry import Counts, Finding, Freed, Registry


@dataclass(frozen=True, slots=True)
class DoctorResult:
    """What was found wrong, what the catalogue holds, and what a garbage collection freed."""

    findings: tuple[Finding, ...]
    counts: Counts
    freed: Freed | None


def doctor(*, gc: bool = False, deep: bool = False, registry: str | None = None) -> DoctorResult:
    """Check that what the catalogue names is on the disk, and that nothing in the store is unnamed or left by a killed run.

    Args:
        gc: free what nothing in the catalogue names, and what killed runs left, wherever it lies; note which merged models and
            undo files are gone.
        deep: read every stored file and compare its sha256.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.

    Raises:
        registry.RegistryError: the catalogue cannot be read, or with `gc` not written.
    """
    with open_registry(registry, read_only=not gc) as catalogue:
        freed = _freed(catalogue) if gc else None
        found = (*catalogue.doctor.examine(deep=deep), *find_leftovers())
        return DoctorResult(found, catalogue.counts(), freed)


def _freed(catalogue: Registry) -> Freed:
    """Free what nothing in the catalogue names, and what killed runs left."""
    freed = catalogue.doctor.collect()
    entries, size_bytes = clear_leftovers()
    return replace(freed, entries=freed.entries + entries, size_bytes=freed.size_bytes + size_bytes)
