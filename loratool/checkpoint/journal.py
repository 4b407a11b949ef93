"""A redo log for changes of a model's folder in place, so that a kill, a full disk or a power cut loses nothing.

New bytes are first written to ``.loratool-journal/redo`` in the folder, with a list of the places they belong to, and
fsynced. Renaming that list to ``commit.json`` commits the change. Before it, nothing in the folder has changed; after it,
the copying can be repeated until it succeeds. The next command that opens the folder finishes or discards the change.

While bytes are copied, every file that changes is sealed (`loratool.checkpoint.seal`), so that no program can load a half
changed model. The seals are lifted last, when everything else is durable.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from loratool.checkpoint.copying import copy_range, flushing, sync_folder
from loratool.checkpoint.file_role import FileRole, role_of
from loratool.checkpoint.header import JOURNAL
from loratool.checkpoint.json_text import LARGEST_LISTING, parse_json_object, read_limited
from loratool.checkpoint.seal import Head, has_head, head_of, leased, seal, unseal
from loratool.checkpoint.staging import foreign_file, sync_tree, unreadable
from loratool.checkpoint.unfinished import Note
from loratool.errors import CheckpointError, OutputError, quoted
from loratool.interrupts import Deferral, note, whole

COMMIT: Final = "commit.json"
REDO: Final = "redo"
NEW: Final = "new"
_OWN: Final = re.compile(r"loratool\.json|loratool-undo(/[0-9a-f]{12})?")
"""Names of loratool's own files that a change in place may add, replace or remove."""


@contextmanager
def locked(folder: Path, *, exclusive: bool) -> Iterator[None]:
    """Lock the folder against other loratool processes: several may read it, or one may change it.

    An interrupted change is finished first, or discarded if it was not committed.

    Raises:
        CheckpointError: the folder cannot be read.
        OutputError: another process is changing the folder, or reading it while this one wants to change it.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CheckpointError(f"cannot read {quoted(folder)}: {error.strerror}") from None
    try:
        _lock(fd, folder, exclusive=exclusive)
        while os.path.lexists(folder / JOURNAL):
            _lock(fd, folder, exclusive=True)
            recover(folder)
            _lock(fd, folder, exclusive=exclusive)
        yield
    finally:
        os.close(fd)


def _lock(fd: int, folder: Path, *, exclusive: bool) -> None:
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"another run of loratool is using {quoted(folder)}; wait for it to end") from None
    except OSError as error:
        # Some network file systems have no locks. A change in place needs one; reading does not.
        if exclusive:
            raise OutputError(f"cannot lock {quoted(folder)}: {error.strerror}; merge with --out instead") from None


def refuse_links(folder: Path, files: list[Path]) -> None:
    """Raise OutputError if the folder or one of its weight `files` is a link, or has a second name (a hard link)."""
    if folder.is_symlink():
        raise OutputError(f"{quoted(folder)} is a link, which loratool never writes through; merge with --out instead")
    for file in files:
        if file.is_symlink() or file.stat().st_nlink > 1:
            raise OutputError(
                f"{quoted(file)} is a link or has a second name (as in the Hub's cache), so a change in place would "
                "reach further than this folder; merge with --out instead"
            )


class _ObstacleError(ValueError):
    """An obstacle to a prepared change, with advice for the user."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(what)
        self.advice = advice


@dataclass(frozen=True, slots=True)
class _Record:
    """The content of a commit.

    Attributes:
        ranges: for each range of a file: ``file``, ``start``, ``stop``, and the offset ``at`` of its bytes in the redo log.
        remove: names of files and folders to remove.
        heads: the head of each file, restored last; empty in commits of older versions.
    """

    ranges: Sequence[dict[str, Any]]
    remove: Sequence[str]
    heads: Mapping[str, Head]


class Journal:
    """A change in place of the files in `folder`, which must be `locked` exclusively.

    `reserve` returns space in the redo log for a range of a file; the caller writes the new bytes there, to `fd`. New files
    are written below `new`. `commit` carries the change out. Leaving the block without `commit` discards it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / JOURNAL
        self.new = self.path / NEW
        self.fd = -1
        self._size = 0
        self._ranges: list[dict[str, Any]] = []
        self._note = Note({"what": "change", "folder": os.path.abspath(folder)})
        self._committed = False

    @whole
    def __enter__(self) -> Self:
        self._note.__enter__()
        try:
            self.new.mkdir(parents=True)
            self.fd = os.open(self.path / REDO, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            self.__exit__(None, None, None)
            raise _unwritable(self.folder, error) from None
        return self

    @whole
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        prepared = (self.path / COMMIT).exists()
        if not prepared:
            shutil.rmtree(self.path, ignore_errors=True)
            self._note.__exit__(None, None, None)
        if error is not None:
            note(error, self._what_became_of_it(prepared))
        if isinstance(error, OSError):
            source = foreign_file(error, (Path(os.path.abspath(self.path)),))
            raise (unreadable(source, error) if source else _unwritable(self.folder, error)) from None

    def _what_became_of_it(self, prepared: bool) -> str:
        if prepared:
            return _how_it_ends(self.folder)
        name = quoted(self.folder)
        return f"the change of {name} is complete" if self._committed else f"{name} is as it was"

    def reserve(self, file: Path, start: int, stop: int) -> int:
        """Reserve space in the redo log for bytes ``start:stop`` of `file`; return their offset in `fd`.

        Raises:
            OutputError: `file` is read-only.
        """
        if not os.access(file, os.W_OK):
            raise OutputError(f"{quoted(file)} is read-only; make it writable, or write to --out instead")
        at = self._size
        self._ranges.append({"file": file.name, "start": start, "stop": stop, "at": at})
        self._size += stop - start
        return at

    def preallocate(self) -> None:
        """Allocate the reserved space, so that a full disk is noticed before any work is done.

        Raises:
            OutputError: the disk is full.
        """
        if self._size:
            try:
                os.posix_fallocate(self.fd, 0, self._size)
            except OSError as error:
                if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
                    raise _unwritable(self.folder, error) from None

    def ahead(self) -> list[Callable[[], None]]:
        """Return jobs that copy the old bytes into the reserved space, which makes writing the new ones faster."""
        return [
            partial(self._copy_old, entry["file"], entry["start"], entry["stop"], entry["at"]) for entry in self._ranges
        ]

    def _copy_old(self, name: str, start: int, stop: int, at: int) -> None:
        fd = os.open(self.folder / name, os.O_RDONLY)
        try:
            copy_range(fd, self.fd, start, stop, at=at)
        finally:
            os.close(fd)

    def commit(self, *, remove: tuple[str, ...] = (), check: Callable[[], None] = lambda: None) -> None:
        """Make the change durable and carry it out. `remove` names loratool's own files or folders to remove.

        `check` is called once no other program can open the files, and may raise. Ctrl-C waits until the change is carried
        out. After a second Ctrl-C, the next command that opens the folder finishes it.

        Raises:
            OutputError: the disk is full, or another program has a file open; then nothing has changed.
        """
        # When the change is repeated after a kill, it must not remove what the first try installed.
        record = {"ranges": self._ranges, "remove": [name for name in remove if not (self.new / name).exists()]}
        files = sorted({self.folder / entry["file"] for entry in self._ranges})
        with self._refusals():
            _checked(self.folder, record)
            os.fsync(self.fd)
            sync_tree(self.new)
        with Deferral(patient=True):
            with self._refusals(), leased(files) as opened:
                check()
                self._commit(record | {"heads": {file.name: head_of(fd, file) for file, fd in opened.items()}})
                with suppress(OSError):  # recover() seals again, and reports the error
                    seal(opened.values())
            recover(self.folder)

    def _commit(self, record: Mapping[str, Any]) -> None:
        draft = self.path / (COMMIT + ".partial")
        draft.write_text(json.dumps(record))
        sync_tree(self.path)
        os.rename(draft, self.path / COMMIT)
        self._committed = True
        for folder in (self.path, self.folder):
            sync_folder(folder)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turn the block's errors into an OutputError that says whether the change is committed."""
        try:
            yield
        except ValueError as error:
            raise OutputError(
                f"{quoted(self.folder)} cannot be changed in place: {error}; write to --out instead"
            ) from None
        except OSError as error:
            raise (_unfinished(self.folder, error) if self._committed else _unwritable(self.folder, error)) from None


def recover(folder: Path) -> None:
    """Finish a committed change of `folder`, or discard an uncommitted one. The folder must be `locked` exclusively.

    Raises:
        CheckpointError: loratool cannot have written the journal for this folder, or the folder has changed so that the
            change cannot be finished.
        OutputError: the change cannot be written.
    """
    journal = folder / JOURNAL
    if not os.path.lexists(journal):
        return  # another process has finished it
    if journal.is_symlink() or not journal.is_dir():
        raise CheckpointError(f"{quoted(journal)} is a link or a file, which loratool never makes; remove it")
    if (journal / COMMIT).is_file():
        record = _committed(folder)
        try:
            with Deferral(patient=True):
                _redo(folder, record)
        except OSError as error:
            raise _unfinished(folder, error) from None
        except KeyboardInterrupt as error:
            if (journal / COMMIT).exists():
                note(error, _how_it_ends(folder))
            raise
    try:
        shutil.rmtree(journal)
    except OSError as error:
        raise OutputError(f"cannot remove {quoted(journal)}: {error.strerror}; remove it yourself") from None
    sync_folder(folder)


def _committed(folder: Path) -> _Record:
    """Return the committed change of `folder`, checked.

    Raises:
        CheckpointError: as `recover`.
    """
    journal = folder / JOURNAL
    try:
        return _checked(folder, parse_json_object(read_limited(journal / COMMIT, LARGEST_LISTING), journal / COMMIT))
    except _ObstacleError as error:
        what, advice = str(error), error.advice
    except OSError as error:
        named = f"{quoted(error.filename)}: " if error.filename is not None else ""
        what, advice = f"{named}{error.strerror or error}", "fix that"
    except (KeyError, TypeError, ValueError, CheckpointError):
        raise CheckpointError(
            f"{quoted(journal)} is not a change that loratool prepared for this folder; remove it and check the model"
        ) from None
    # The model may be half changed, and only the journal can make it whole.
    raise CheckpointError(
        f"the change prepared in {quoted(journal)} cannot be finished: {what}; {advice} and run again; "
        "keep the journal, since to remove it could leave the model half changed"
    )


def _redo(folder: Path, record: _Record) -> None:
    with ExitStack() as stack:
        files = {}
        for name in sorted({entry["file"] for entry in record.ranges}):
            files[name] = os.open(folder / name, os.O_RDWR | os.O_NOFOLLOW)
            stack.callback(os.close, files[name])
        sealed = {files[name]: head for name, head in record.heads.items() if name in files}
        seal(sealed)
        _copy_ranges(folder, record.ranges, files)
        _install(folder, record.remove)
        unseal(sealed)
    # Repeating the change from here would find nothing to install, so the commit is removed before the rest of the journal.
    os.unlink(folder / JOURNAL / COMMIT)
    sync_folder(folder / JOURNAL)


def _copy_ranges(folder: Path, ranges: Sequence[dict[str, Any]], files: Mapping[str, int]) -> None:
    with open(folder / JOURNAL / REDO, "rb") as redo, flushing(files.values()):
        for entry in ranges:
            length = entry["stop"] - entry["start"]
            copy_range(redo.fileno(), files[entry["file"]], entry["at"], entry["at"] + length, at=entry["start"])
    for fd in files.values():
        os.fsync(fd)


def _install(folder: Path, remove: Sequence[str]) -> None:
    """Remove what the change removes, and move new files to their places."""
    journal = folder / JOURNAL
    for name in remove:
        with suppress(FileNotFoundError):
            target = folder / name
            shutil.rmtree(target) if target.is_dir() and not target.is_symlink() else target.unlink()
        if target.parent.is_dir():
            sync_folder(target.parent)
    for source in sorted((journal / NEW).rglob("*")):
        target = folder / source.relative_to(journal / NEW)
        if source.is_dir():
            target.mkdir(exist_ok=True)
        else:
            os.replace(source, target)
        sync_folder(target.parent)
    sync_folder(folder)


def _checked(folder: Path, record: dict[str, Any]) -> _Record:
    """Return the record, after checking that it changes only weight files and loratool's own files in this folder.

    Raises:
        _ObstacleError: the folder has changed since the change was prepared.
        ValueError: the record reaches further, or the redo log is missing.
        OSError: the folder cannot be accessed.
    """
    journal = folder / JOURNAL
    for path in journal.rglob("*"):
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise ValueError(f"{quoted(path)} is in the way")
    if not (journal / REDO).exists():
        raise ValueError(f"{quoted(journal / REDO)} is gone")
    redo = (journal / REDO).stat().st_size
    for entry in record["ranges"]:
        file, *numbers = (entry[key] for key in ("file", "start", "stop", "at"))
        if not all(type(number) is int for number in numbers):
            raise ValueError(f"{quoted(file)} is in the way")
        start, stop, at = numbers
        inside = 0 <= start <= stop and 0 <= at <= at + stop - start <= redo
        if "/" in file or not file.endswith(".safetensors") or not inside:
            raise ValueError(f"{quoted(file)} is in the way")
        _check_own_file(folder / file, stop)
    for path in (journal / NEW).rglob("*"):
        name = path.relative_to(journal / NEW)
        if not (_OWN.fullmatch(str(name)) or _OWN.fullmatch(str(name.parent)) or _is_of_tokenizer(str(name))):
            raise ValueError(f"{quoted(name)} is in the way")
        for part in (name, *name.parents[:-1]):
            _refuse_link(folder / part)
    for name in record["remove"]:
        if not (_OWN.fullmatch(name) or _is_of_tokenizer(name)):
            raise ValueError(f"{quoted(name)} is in the way")
        if "/" in name:
            _refuse_link((folder / name).parent)
    for name, head in record.get("heads", {}).items():
        _check_head(folder / name, head)
    return _Record(record["ranges"], record["remove"], record.get("heads", {}))


def _is_of_tokenizer(name: str) -> bool:
    """Return whether `name` is that of a tokenizer file or chat template in the folder, which a merge may add."""
    return "/" not in name and role_of(name) in (FileRole.TOKENIZER, FileRole.CHAT_TEMPLATE)


def _check_head(file: Path, head: dict[str, Any]) -> None:
    """Raise _ObstacleError unless `file` has the head that it had when the change was prepared."""
    if type(head["length"]) is not int:
        raise ValueError(f"{quoted(file)} is in the way")
    fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        same = has_head(fd, head)
    finally:
        os.close(fd)
    if not same:
        raise _ObstacleError(f"{quoted(file)} is another file than it was", "put the original file back")


def _check_own_file(file: Path, stop: int) -> None:
    """Raise _ObstacleError unless `file` is a regular file with a single name and at least `stop` bytes."""
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise _ObstacleError(f"{quoted(file)} is a link or not a file", "put the file itself in its place")
    if status.st_nlink > 1:
        raise _ObstacleError(f"{quoted(file)} has a second name", "remove that")
    if status.st_size < stop:
        raise _ObstacleError(f"{quoted(file)} has become shorter", "put the whole file back")


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise _ObstacleError(f"{quoted(path)} is a link", "move that away")


def _how_it_ends(folder: Path) -> str:
    """Return a note on a change that is committed but not carried out."""
    return (
        f"the change of {quoted(folder)} is prepared, and the next loratool command on it finishes it; until then no program "
        "can load it"
    )


def _unfinished(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"a change of {quoted(folder)} is prepared but could not be finished: {error.strerror}; fix that and run any loratool "
        "command on the folder again; until then no program can load it"
    )


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot change {quoted(folder)} in place: {error.strerror or error}; nothing was changed; "
        "it takes as much free space as the tensors that change"
    )
