"""The content store: the files of catalogued adapters, named by their content.

An entry is a folder `store/<key[:2]>/<key>/`. Its key is the sha256 of its listing, one line `<sha256>  <file name>` a
file, sorted by name, as `sha256sum *` prints it; so a key stands for the weights and for the config beside them.

What makes it safe with several processes, and with one that is killed:

- an entry appears under its key complete and fsynced, by one rename, or not at all;
- adding is files first, then row: files are staged in `store/tmp` without any lock, then published and named by a row
  in one write transaction. Killed in between, it leaves an entry that no row names, which `collect` frees;
- removing is row first, then files: `collect` runs in a write transaction of its own and takes only what no row names.

Nothing is written through a link: every folder is checked to be one, every file is newly made.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from registry.errors import RegistryError, RegistryFullError, RegistryReadOnlyError
from registry.names import printable
from registry.places import DATABASE_NAME
from registry.plain_file import UnreadableFileError, open_plain, read_plain
from registry.siblings import names_nothing

_KEY = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 20
_ABANDONED_AFTER_SECONDS = 24 * 3600
STAGING = "tmp"
_CATALOGUES = "catalogues"
_LARGEST_LIST = 1 << 20

Source = Path | bytes | Iterable[bytes]
"""Where the content of a stored file comes from: a file, its bytes, or their pieces in order."""


@dataclass(frozen=True, slots=True)
class Staged:
    """Files copied into the store's staging folder, not yet under their key. As a context it removes what is left."""

    key: str
    folder: Path
    sha256: Mapping[str, str]
    size_bytes: int

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.discard()


class Store:
    """The content store in the folder `root`, which is made when the first file comes.

    `catalogue` is the database whose rows name its entries. Those of several may lie in one store, which keeps a list of
    them: what one does not name is then not removed, as it may be another's.
    """

    def __init__(self, root: Path, catalogue: str = "") -> None:
        self.root = root
        self.own_catalogue = str(root.parent / DATABASE_NAME)
        self.catalogue = catalogue or self.own_catalogue

    def other_catalogues(self) -> list[str]:
        """Return the other catalogues with files here, sorted. SQLite files that are gone or name no entry are left out."""
        others = {*self._listed(), self.own_catalogue} - {self.catalogue}
        return sorted(each for each in others if not (Path(each).is_absolute() and names_nothing(Path(each))))

    def is_key(self, key: str) -> bool:
        """Return whether an entry could have this key."""
        return _KEY.fullmatch(key) is not None

    def path(self, key: str) -> Path:
        """Return the folder of an entry, which may not exist."""
        if _KEY.fullmatch(key) is None:
            raise RegistryError(f"'{printable(key)}' is not a key of the store; run 'loratool doctor'")
        return self.root / key[:2] / key

    def stage(self, files: Mapping[str, Source], sha256: Mapping[str, str] | None = None) -> Staged:
        """Copy `files` (name in the entry -> source, content, or pieces of it) into the staging folder, and hash them.

        Links among the sources are followed. `sha256` holds expected digests of some of the copies. Publish the result in the
        write transaction that refers to it in a row, or discard it.

        Raises:
            RegistryError: a name is not a plain file name, a source is not a file or has another digest, or the disk is full
                or cannot be written.
        """
        for name in files:
            _check_file_name(name)
        expected = dict(sha256 or {})
        staging = self.folder(STAGING)
        folder = staging / secrets.token_hex(8)
        try:
            folder.mkdir()
            copied = {name: _copy(files[name], folder / name) for name in sorted(files)}
            _fsync_folder(folder)
            for name, digest in expected.items():
                if name not in copied or copied[name][0] != digest:
                    found = copied[name][0] if name in copied else "no such file"
                    raise RegistryError(
                        f"the copy of '{name}' in the store has sha256 {found}, expected {digest}; "
                        "the file changed while it was read: add it again"
                    )
            digests = {name: digest for name, (digest, _) in copied.items()}
            return Staged(entry_key(digests), folder, digests, sum(size for _, size in copied.values()))
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise _disk_error(error, folder) from error
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def publish(self, staged: Staged) -> Path:
        """Move staged files to their key, and return the entry's folder. A complete existing entry is kept.

        Call it in the write transaction that refers to the key in a row, so that `collect` cannot run in between.
        """
        target = self.path(staged.key)
        try:
            self._enlist()
            shard = self.folder(staged.key[:2])
            try:
                staged.folder.rename(target)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                if not _is_like(target, staged.folder):
                    self._set_aside(target)
                    staged.folder.rename(target)
            _fsync_folder(shard)
        except OSError as error:
            raise _disk_error(error, target) from error
        staged.discard()
        return target

    def put(self, files: Mapping[str, Source], sha256: Mapping[str, str] | None = None) -> str:
        """Stages and publishes at once and returns the key. See `publish` for when this is safe."""
        with self.stage(files, sha256) as staged:
            self.publish(staged)
            return staged.key

    def entries(self) -> Iterator[str]:
        """Yield the keys of all entries, sorted."""
        for shard in _entries(self.root):
            if len(shard.name) == 2 and shard.is_dir(follow_symlinks=False):
                for entry in _entries(Path(shard.path)):
                    if _KEY.fullmatch(entry.name) and entry.name.startswith(shard.name):
                        yield entry.name

    def abandoned(self) -> list[Path]:
        """Return staging folders unchanged for a day, which killed processes left."""
        oldest = time.time() - _ABANDONED_AFTER_SECONDS
        return [
            Path(entry.path)
            for entry in _entries(self.root / STAGING)
            if entry.stat(follow_symlinks=False).st_mtime < oldest
        ]

    def size_bytes(self, folder: Path) -> int:
        """Return the size in bytes of the files in an entry or staging folder."""
        return sum(entry.stat(follow_symlinks=False).st_size for entry in _entries(folder))

    def is_whole(self, key: str) -> bool:
        """Read the entry's files again, and return whether they still have the content of the key."""
        try:
            digests = {entry.name: _sha256(Path(entry.path)) for entry in _entries(self.path(key))}
        except (OSError, UnreadableFileError):
            return False
        return bool(digests) and entry_key(digests) == key

    def collect(self, named: Iterable[str], among: Iterable[str] | None = None) -> tuple[int, int]:
        """Remove the entries that are not `named`, of all or of those in `among`; return their number and bytes.

        If other catalogues have files here, no entry is removed, since it may be theirs. Call it in a write transaction that
        has read `named`. Without `among`, staging folders that are a day old are removed, too.
        """
        kept = set(named)
        candidates = () if self.other_catalogues() else self.entries() if among is None else among
        doomed = [self.path(key) for key in candidates if key not in kept]
        abandoned = self.abandoned() if among is None else []
        entries = freed = 0
        try:
            for folder in doomed:
                if folder.exists():
                    entries, freed = entries + 1, freed + self.size_bytes(folder)
                    self._set_aside(folder)
                self._remove_labels(folder)
            for folder in abandoned:
                entries, freed = entries + 1, freed + self.size_bytes(folder)
                shutil.rmtree(folder) if folder.is_dir() and not folder.is_symlink() else folder.unlink()
        except OSError as error:
            raise _disk_error(error, self.root) from error
        return entries, freed

    def _listed(self) -> list[str]:
        """Return the catalogues with files here, except that of the store's own home."""
        try:
            data = read_plain(self.root / _CATALOGUES, _LARGEST_LIST)
            if data is not None and len(data) > _LARGEST_LIST:
                raise UnreadableFileError(f"it has more than {_LARGEST_LIST:,} bytes")
            return [] if data is None else data.decode().splitlines()
        except ValueError as error:
            raise RegistryError(
                f"'{printable(str(self.root / _CATALOGUES), 400)}' is not the list of the catalogues with files in the store, "
                f"one per line ({error}); correct it, or delete it if there is only the catalogue of this folder"
            ) from None

    def _enlist(self) -> None:
        """Add the catalogue to the list of those with files here."""
        if self.catalogue in (self.own_catalogue, *self._listed()):
            return
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        with open(os.open(self.root / _CATALOGUES, flags, 0o666), "a", encoding="utf-8") as file:
            file.write(f"{self.catalogue}\n")
            file.flush()
            os.fsync(file.fileno())

    def _remove_labels(self, entry: Path) -> None:
        """Remove an entry's labels (`registry.label_files`)."""
        for path in _entries(entry.parent):
            if path.name.startswith(f"{entry.name}."):
                Path(path.path).unlink(missing_ok=True)

    def _set_aside(self, folder: Path) -> None:
        """Remove an entry. It is moved away first, so that no other process sees half of it."""
        aside = self.folder(STAGING) / f"{secrets.token_hex(8)}.removed"
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def folder(self, name: str) -> Path:
        """Return a folder of the store, made if it is missing, after checking that it is not a link."""
        for folder in (self.root, self.root / name):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                plain = stat.S_ISDIR(os.lstat(folder).st_mode)
            except FileExistsError:
                plain = False
            except OSError as error:
                raise _disk_error(error, folder) from error
            if not plain:
                raise RegistryError(
                    f"'{printable(str(folder), 400)}' is no folder but a link or a file, and the store writes "
                    "through neither; remove it, or set LORATOOL_HOME to the place it leads to"
                )
        return self.root / name


def entry_key(sha256: Mapping[str, str]) -> str:
    """Return the key of an entry with these files (name -> hex digest): the sha256 of their listing."""
    listing = "".join(f"{sha256[name]}  {name}\n" for name in sorted(sha256))
    return hashlib.sha256(listing.encode()).hexdigest()


def _check_file_name(name: str) -> None:
    plain = name and not name.startswith(".") and name.isprintable() and not set(name) & set('/\\:*?"<>|')
    if not plain or len(name.encode(errors="replace")) > 200:
        raise RegistryError(
            f"'{printable(name)}' is no plain file name, so the store does not take it; rename it to letters, "
            "digits and '.'"
        )


def _copy(source: Source, target: Path) -> tuple[str, int]:
    """Write the content of `source` to a new file, with fsync; return its sha256 and size."""
    digest = hashlib.sha256()
    size = 0
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
    with os.fdopen(descriptor, "wb", buffering=0) as output:
        for chunk in _pieces(source):
            digest.update(chunk)
            size += len(chunk)
            left = memoryview(chunk)
            while left:
                left = left[output.write(left) :]
        os.fsync(output.fileno())
    return digest.hexdigest(), size


def _pieces(source: Source) -> Iterable[bytes | memoryview]:
    if isinstance(source, bytes):
        return [source]
    return _chunks(source) if isinstance(source, Path) else source


def _chunks(source: Path) -> Iterator[memoryview]:
    try:
        descriptor = os.open(source, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise RegistryError(
            f"'{printable(str(source), 400)}' cannot be read ({error.strerror}); name a file that you may read"
        ) from None
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise RegistryError(f"'{printable(str(source), 400)}' is not a regular file; name one")
        buffer = memoryview(bytearray(_CHUNK))
        while count := file.readinto(buffer):
            yield buffer[:count]


def _sha256(path: Path) -> str:
    with os.fdopen(open_plain(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_like(entry: Path, staged: Path) -> bool:
    """Whether an entry has the same files as the staged folder, by name and size."""
    if entry.is_symlink() or not entry.is_dir():
        return False
    sizes = [
        {file.name: file.stat(follow_symlinks=False).st_size for file in _entries(folder)} for folder in (entry, staged)
    ]
    return sizes[0] == sizes[1]


def _fsync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_error(error: OSError, where: Path) -> RegistryError:
    shown = printable(str(where), 400)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RegistryFullError(
            f"the disk of '{shown}' is full; nothing was catalogued: free some space and try again"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return RegistryReadOnlyError(
            f"'{shown}' cannot be written ({error.strerror}); give yourself write permission, or set LORATOOL_HOME"
        )
    return RegistryError(f"the store failed at '{shown}' ({error.strerror}); check the disk and try again")
