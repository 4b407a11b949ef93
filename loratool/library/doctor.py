"""`loratool.doctor`: the catalogue against the disk."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loratool.interrupts import Deferral
from loratool.library.leftovers import clear_leftovers, find_leftovers
from loratool.library.opening import open_registry
from loratool.library.progress import Progress
from registry import Backup, Counts, Finding, Freed, Rebuilt, Registry, RemovedAdapter
from registry.backups import put_back
from registry.trash import KEPT_DAYS


@dataclass(frozen=True, slots=True)
class DoctorResult:
    """What was found wrong, what the catalogue holds, what a garbage collection freed, and what a rebuild named again.

    `backups` are those of the catalogue's database, the newest first; `put_back` is the shell command that puts the newest one
    in its place. `trash` is what was removed and can be restored.
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
    """Check that what the catalogue names is on the disk, and that nothing in the store is unnamed or left by a killed run.

    Args:
        gc: free what nothing in the catalogue names, and what killed runs left, wherever it lies; note which merged models and
            undo files are gone.
        deep: read every stored file and compare its sha256.
        rebuild: name again what the store has and the catalogue has lost. Entries that are there stay as they are.
        trash_days: with `gc`, free what has been in the trash for so many days.
        yes: free also what a rebuild could name, or most of the store.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.
        progress: told how many adapters are checked, or with `deep` how many bytes are read.

    Raises:
        registry.RegistryError: the catalogue cannot be read, or with `gc` or `rebuild` not written; `registry.NotSureError`
            where `gc` would free what needs `yes`.
    """
    with open_registry(registry, read_only=not (gc or rebuild), examined=True) as catalogue:
        rebuilt = catalogue.doctor.rebuild() if rebuild else None
        freed = _freed(catalogue, yes, trash_days) if gc else None
        unnamed = {each.subject: each for each in rebuilt.unnamed} if rebuilt else {}  # these say why
        examined = [unnamed.get(each.subject, each) for each in catalogue.doctor.examine(deep=deep, watcher=progress)]
        found = (*examined, *find_leftovers())
        backups, file = catalogue.backups(), catalogue.file
        way = None if file is None or not backups else put_back(file, backups[0].path)
        return DoctorResult(found, catalogue.counts(), freed, rebuilt, backups, way, catalogue.trash.list())


def _freed(catalogue: Registry, yes: bool, trash_days: float) -> Freed:
    """Free what nothing in the catalogue names, and what killed runs left."""
    with Deferral():  # an entry that has left the trash and not the store would be offered for a rebuild
        freed = catalogue.doctor.collect(sure=yes, trash_days=trash_days)
    entries, size_bytes = clear_leftovers()
    return replace(freed, entries=freed.entries + entries, size_bytes=freed.size_bytes + size_bytes)
