"""Search for faults of a catalogue: every row is compared with its files, and every entry of the store with the rows.

The number of queries does not grow with the number of rows. The rest of the work is on the disk.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from sqlalchemy import select

from registry import repair
from registry.bases import Bases
from registry.database import Database
from registry.errors import DamagedValueError
from registry.label_files import label_path, listing, own_suffix, read_label
from registry.labels import named_keys
from registry.merges import Merges
from registry.names import printable, to_paste
from registry.places import is_gone
from registry.plain_file import UnreadableFileError, open_plain
from registry.rebuild import Rebuild
from registry.records import Finding, FindingKind, RemovedAdapter
from registry.store import Store, entry_key
from registry.tables import adapters, locations
from registry.trash_rows import rows as trash_rows

T = TypeVar("T")
_CHUNK = 1 << 20
_ADAPTERS = (
    select(
        adapters.c.id,
        adapters.c.name,
        adapters.c.version,
        locations.c.store_key,
        locations.c.path,
        locations.c.repo,
        locations.c.revision,
        locations.c.path_in_repo,
    )
    .select_from(adapters.outerjoin(locations, locations.c.adapter_id == adapters.c.id))
    .order_by(adapters.c.name, adapters.c.version, locations.c.id)
)


class _Place(NamedTuple):
    """One place of an adapter's files. All columns of the place are None for an adapter without places."""

    id: int
    name: str
    version: int
    store_key: str | None
    path: Path | None
    repo: str | None
    revision: str | None
    path_in_repo: str | None


class Watcher(Protocol):
    """Receiver of an examination's progress."""

    def begin(self, label: str, total: int) -> None:
        """Begin a step of `total` adapters or, if files are read, bytes."""

    def advance(self, count: int) -> None:
        """Report that `count` more are done."""


class Nobody:
    """Receiver that ignores all reports."""

    def begin(self, label: str, total: int) -> None:
        pass

    def advance(self, count: int) -> None:
        pass


class Examination:
    """One examination of a catalogue and its store. `watcher` counts adapters, or bytes if files are read (`deep`)."""

    def __init__(self, database: Database, store: Store, bases: Bases, merges: Merges, rebuild: Rebuild,
                 watcher: Watcher | None = None) -> None:  # fmt: skip
        self._database = database
        self._store = store
        self._bases, self._merges = bases, merges
        self._rebuild = rebuild
        self._watcher = watcher or Nobody()
        self._entry_faults: dict[str, tuple[_Fault, ...]] = {}

    def run(self, *, deep: bool = False) -> tuple[Finding, ...]:
        """Return all faults. With `deep`, every file of the store is read and its sha256 compared."""
        with self._database.reading() as connection:
            rows = [_Place(*row) for row in connection.execute(_ADAPTERS)]
            named = named_keys(connection)
            removed = trash_rows(connection)
            found = [
                *repair.findings(connection, removed, lambda key: self._rebuild.adapters_of(key)[0]),
                *self._missing_bases(),
                *self._adapters(rows, named, deep=deep),
                *self._removed(removed, deep=deep),
                *self._missing_merges(),
                *self._orphans(named),
            ]
        return tuple(found)

    # Adapters.

    def _adapters(self, rows: Sequence[_Place], named: set[str], *, deep: bool) -> Iterator[Finding]:
        keys = filter(self._store.is_key, named)
        if deep:
            self._watcher.begin("reading the store", sum(self._store.size_bytes(self._store.path(key)) for key in keys))
        else:
            self._watcher.begin("checking", len({row.id for row in rows}))
        for _, places in groupby(rows, key=lambda row: row.id):
            yield from self._adapter(list(places), deep=deep)
            if not deep:
                self._watcher.advance(1)

    def _adapter(self, places: Sequence[_Place], *, deep: bool) -> Iterator[Finding]:
        """Yield a finding if no place or not the store holds the files, and one for each missing or changed file there."""
        reference = f"{places[0].name}@{places[0].version}"
        way = _way_back(places)
        keys = [row.store_key for row in places if row.store_key is not None]
        for key in keys:
            if not self._store.is_key(key):
                yield _finding(
                    "adapter-files-missing",
                    reference,
                    None,
                    f"the row of {reference} names '{printable(key)}', which is not an entry of the store; {way}",
                )
        in_store = [self._store.path(key) for key in keys if self._store.is_key(key)]
        elsewhere = [row.path for row in places if row.path is not None]
        lost = [path for path in (*in_store, *elsewhere) if is_gone(path)]
        gone = len(lost) == len(in_store) + len(elsewhere) and not any(row.repo for row in places)
        if gone or any(path in in_store for path in lost):
            where = "everywhere" if gone else "the store"
            at = f" (they were at {_quoted(lost[0])})" if lost else ""
            message = f"the files of {reference} are gone from {where}{at}; {way}"
            yield _finding("adapter-files-missing", reference, lost[0] if lost else None, message)
        for folder in in_store:
            if folder not in lost:
                for kind, path, fault in self._faults(folder, deep=deep):
                    yield _finding(
                        kind, reference, path, f"{fault.format(reference=reference)}; {_ending(kind, folder, way)}"
                    )

    def _faults(self, folder: Path, *, deep: bool) -> tuple[_Fault, ...]:
        """Return the faults of an existing entry, computed once for all adapters that share it."""
        key = folder.name
        if key not in self._entry_faults:
            self._entry_faults[key] = tuple(self._look_at(folder, deep=deep))
        return self._entry_faults[key]

    def _look_at(self, folder: Path, *, deep: bool) -> Iterator[_Fault]:
        found = _files_in(folder)
        if found is None:
            yield (
                "store-damaged",
                folder,
                f"the entry of {{reference}}, {_literal(folder)}, is not a readable folder",
            )
            return
        files, others = found
        digests, sizes = self._labelled(folder.name)
        expected = {*(digests or ()), *sizes}
        foreign = others - expected | (files.keys() - expected if expected else set())
        for name in sorted(foreign):
            what = "a link, a folder or a pipe" if name in others else "a file"
            message = f"{_literal(folder / name)} is {what} that was not there when {{reference}} was stored"
            yield "store-foreign", folder / name, message
            files.pop(name, None)
        for name in sorted(expected):
            file = folder / name
            if name not in files:
                yield "adapter-files-missing", file, f"{{reference}} has lost the file {_literal(file)}"
            elif files[name] != sizes.get(name, files[name]):
                yield (
                    "store-damaged",
                    file,
                    f"the file {_literal(file)} of {{reference}} has {files[name]:,} bytes instead of {sizes[name]:,}",
                )
        if not files and not sizes:
            yield "adapter-files-missing", folder, f"the entry of {{reference}}, {_literal(folder)}, is empty"
        elif files and deep:
            yield from self._changed(folder, files, digests)

    def _labelled(self, key: str) -> tuple[Mapping[str, str] | None, Mapping[str, int]]:
        """Return the sha256 and sizes of an entry's files by its label. What the label lacks is not compared."""
        try:
            label = read_label(label_path(self._store, key, own_suffix(self._store)))
        except ValueError:
            return None, {}
        sizes = {} if label is None else label.get("sizes")
        is_plain = isinstance(sizes, dict) and all(type(size) is int for size in sizes.values())
        return listing(label, key), sizes if is_plain and isinstance(sizes, dict) else {}

    def _changed(self, folder: Path, files: Mapping[str, int], expected: Mapping[str, str] | None) -> Iterator[_Fault]:
        """Yield a fault for each file whose content has changed, by the entry's key."""
        digests: dict[str, str] = {}
        for name in sorted(files):
            try:
                digests[name] = self._sha256(folder / name)
            except (OSError, UnreadableFileError) as error:
                reason = printable(getattr(error, "strerror", None) or str(error))
                yield (
                    "store-damaged",
                    folder / name,
                    f"the file {_literal(folder / name)} of {{reference}} cannot be read ({reason})",
                )
                return
        if entry_key(digests) == folder.name:
            return
        changed = [name for name in sorted(digests) if expected is not None and expected.get(name) != digests[name]]
        for name in changed:
            was = (expected or {}).get(name)
            now = f"its sha256 is {digests[name][:12]}… instead of {was[:12]}…" if was else "it was not there"
            yield (
                "store-damaged",
                folder / name,
                f"the file {_literal(folder / name)} of {{reference}} has changed: {now}",
            )
        if expected is None:
            yield "store-damaged", folder, f"the files of {{reference}} in {_literal(folder)} have changed"

    def _sha256(self, file: Path) -> str:
        digest = hashlib.sha256()
        with os.fdopen(open_plain(file), "rb", buffering=0) as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                self._watcher.advance(len(chunk))
        return digest.hexdigest()

    def _removed(self, rows: Sequence[RemovedAdapter], *, deep: bool) -> Iterator[Finding]:
        for row in rows:
            reference = row.reference
            if row.store_key is None:
                continue
            way = (
                f"it is in the trash, and cannot be restored whole: forget it with 'loratool remove {reference} --now'"
            )
            folder = self._store.path(row.store_key) if self._store.is_key(row.store_key) else None
            if folder is None or is_gone(folder):
                at = "" if folder is None else f" (they were at {_quoted(folder)})"
                message = f"the files of {reference} are gone{at}; {way}"
                yield _finding("adapter-files-missing", reference, folder, message)
                continue
            for kind, path, fault in self._faults(folder, deep=deep):
                ending = _FOREIGN if kind == "store-foreign" else way
                yield _finding(kind, reference, path, f"{fault.format(reference=reference)}; {ending}")

    # Bases and merges.

    def _missing_bases(self) -> Iterator[Finding]:
        for base in _sound(self._bases.list):
            # A base with recorded files on the Hub is downloaded again when it is needed.
            if base.path is not None and is_gone(base.path) and not (base.files and base.revision):
                yield _finding(
                    "base-missing",
                    base.name,
                    base.path,
                    f"the files of base '{base.name}' are no longer at {_quoted(base.path)}; say where they are with "
                    f"'loratool base add {base.name} FOLDER', or remove it with 'loratool base remove {base.name}'",
                )

    def _missing_merges(self) -> Iterator[Finding]:
        for merge in _sound(lambda: self._merges.list(state="merged")):
            merged = " + ".join(member.adapter for member in merge.adapters)
            if is_gone(merge.output):
                yield _finding(
                    "merge-output-missing",
                    merged,
                    merge.output,
                    f"the model merged from {merged} is no longer at {_quoted(merge.output)}; put it "
                    "back or merge again if you need it, or let 'loratool doctor --gc' note that it is gone",
                )
            elif merge.undo_file is not None and is_gone(merge.undo_file):
                yield _finding(
                    "undo-file-missing",
                    merged,
                    merge.undo_file,
                    f"the undo file of the merge of {merged} is no longer at {_quoted(merge.undo_file)}; put it back, or let "
                    "'loratool doctor --gc' note that 'loratool unmerge' needs the base instead",
                )

    # Store entries without a row.

    def _orphans(self, named: set[str]) -> Iterator[Finding]:
        if self._store.other_catalogues():
            return  # the entries may belong to these
        entries = [(key, self._store.path(key)) for key in self._store.entries() if key not in named]
        lost = self._rebuild.lost(key for key, _ in entries) if entries else {}
        for subject, path in [*entries, *((path.name, path) for path in self._store.abandoned())]:
            message = (
                f"nothing in the catalogue refers to {_quoted(path)} in the store; 'loratool doctor --gc' frees it"
            )
            if subject in lost:
                message = (
                    f"the catalogue has lost {' and '.join(lost[subject])}, whose files are in {_quoted(path)}; "
                    "'loratool doctor --rebuild' restores what the store has"
                )
            elif entries and not named:  # more likely a lost catalogue than a store of nothing but leftovers
                message = (
                    f"nothing in the catalogue refers to {_quoted(path)} in the store; if {self._database.where} was lost, "
                    f"restore a backup of it, else catalogue this with {to_paste('loratool add PATH --name NAME', path)}, "
                    "or free it for good with 'loratool doctor --gc --yes'"
                )
            yield _finding("store-orphan", subject, path, message, self._store.size_bytes(path))


_Fault = tuple[FindingKind, Path, str]
"""A fault of an entry: its kind, its path, and a message with `{reference}` in place of the adapter."""


_FOREIGN = "delete it, or move it away"


def _ending(kind: FindingKind, folder: Path, way: str) -> str:
    """Return what to do about a fault of an adapter's entry."""
    if kind == "store-foreign":
        return _FOREIGN
    return way if kind == "adapter-files-missing" else f"delete {_quoted(folder)}, then {way}"


def _sound(read: Callable[[], Sequence[T]]) -> Sequence[T]:
    """Return what was read; nothing if a row is damaged, which is a finding of its own."""
    try:
        return read()
    except DamagedValueError:
        return ()


def _finding(kind: FindingKind, subject: str, path: Path | None, message: str, size_bytes: int = 0) -> Finding:
    return Finding(kind=kind, subject=subject, path=path, message=message, size_bytes=size_bytes)


def _quoted(path: Path) -> str:
    return f"'{printable(str(path), 400)}'"


def _literal(path: Path) -> str:
    """Return a path for a message on which `str.format` is called later."""
    return _quoted(path).replace("{", "{{").replace("}", "}}")


def _way_back(places: Sequence[_Place]) -> str:
    """Return advice on how to get an adapter's files again from another place, or how to remove the adapter."""
    name, reference = places[0].name, f"{places[0].name}@{places[0].version}"
    again = f"add it again with 'loratool add PATH --name {name}'"
    for row in places:
        if row.path is not None and not is_gone(row.path):
            again = f"add it again with {to_paste(f'loratool add PATH --name {name}', row.path)}"
        elif row.repo:
            inside = f"/{row.path_in_repo}" if row.path_in_repo else ""
            commit = f"@{row.revision}" if row.revision else ""
            again = f"get it again with 'loratool pull {row.repo}{inside}{commit} --name {name}'"
    return f"{again}, or remove it with 'loratool remove {reference}'"


def _files_in(folder: Path) -> tuple[dict[str, int], set[str]] | None:
    """Return the sizes of a folder's regular files by name, and the names of all else; None if it cannot be read."""
    try:
        with os.scandir(folder) as found:
            facts = [(entry.name, entry.stat(follow_symlinks=False)) for entry in found]
    except OSError:
        return None
    files = {name: each.st_size for name, each in facts if stat.S_ISREG(each.st_mode)}
    return files, {name for name, _ in facts} - files.keys()
