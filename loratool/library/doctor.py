"""`loratool.doctor`: check the catalogue against the disk."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loratool.interrupts import Deferral
from loratool.library.recording.leftovers import clear_leftovers, find_leftovers
from loratool.library.recording.opening import open_registry
from loratool.library.reporting.progress import Progress
from registry import Backup, Counts, Finding, Freed, Rebuilt, Registry, RemovedAdapter
from registry.backups import put_back
from registry.trash import KEPT_DAYS


@dataclass(frozen=True, slots=True)
class DoctorResult:
    """The result of a check.

    Attributes:
        findings: the faults.
        counts: numbers of entries in the catalogue.
        freed: what garbage collection freed, if it ran.
        rebuilt: what a rebuild restored, if it ran.
        backups: backups of the catalogue's database, newest first.
        put_back: shell command that restores the newest backup.
        trash: removed adapters that can be restored.
    """

    findings: tuple[Finding, ...]
    counts: Counts
    freed: Freed | None
    rebuilt: Rebuilt | None = None
    backups: tuple[Backup, ...] = ()
    put_back: str | None = None
    trash: tuple[RemovedAdapter, ...] = ()


def doctor(*, gc: bool = False, deep: bool = False, rebuild: bool = False, yes: bool = False,
           trash_days: float = KEPT_DAYS, registry: str | None = None,
           progress: Progress | None = None) -> DoctorResult:  # fmt: skip
    """Check that the catalogue's files exist and that the catalogue has all entries of the store; find remains of killed runs.

    Args:
        gc: free files that nothing in the catalogue refers to, and remains of killed runs anywhere on disk; record which
            merged models and undo files are gone.
        deep: read every stored file and compare its sha256.
        rebuild: restore entries that the store has and the catalogue has lost. Existing entries stay as they are.
        trash_days: with `gc`, free what has been in the trash for this many days.
        yes: also free files that a rebuild could restore, or most of the store.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.
        progress: receives the number of adapters checked, or with `deep` of bytes read.

    Raises:
        registry.NotSureError: `gc` would free files that need `yes`.
        registry.RegistryError: the catalogue cannot be read, or cannot be written with `gc` or `rebuild`.
    """
    with open_registry(registry, read_only=not (gc or rebuild), examined=True) as catalogue:
        rebuilt = catalogue.doctor.rebuild() if rebuild else None
        freed = _freed(catalogue, yes, trash_days) if gc else None
        unnamed = (
            {each.subject: each for each in rebuilt.unnamed} if rebuilt else {}
        )  # these say why it was not restored
        examined = [unnamed.get(each.subject, each) for each in catalogue.doctor.examine(deep=deep, watcher=progress)]
        found = (*examined, *find_leftovers())
        backups, file = catalogue.backups(), catalogue.file
        way = None if file is None or not backups else put_back(file, backups[0].path)
        return DoctorResult(found, catalogue.counts(), freed, rebuilt, backups, way, catalogue.trash.list())


def _freed(catalogue: Registry, yes: bool, trash_days: float) -> Freed:
    """Free files that nothing in the catalogue refers to, and remains of killed runs."""
    with Deferral():  # or an entry removed from the trash but not from the store would look like one to restore
        freed = catalogue.doctor.collect(sure=yes, trash_days=trash_days)
    entries, size_bytes = clear_leftovers()
    return replace(freed, entries=freed.entries + entries, size_bytes=freed.size_bytes + size_bytes)
