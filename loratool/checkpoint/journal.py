"""Changing a model folder in place so that a kill, a full disk or a power cut loses nothing: a redo log.

New bytes are first written to ``.loratool-journal/redo`` in the folder, with a list of where they belong, and fsynced.
Renaming that list to ``commit.json`` is the commit: before it nothing in the folder has changed, and after it the
change can be finished by copying, as often as it takes. Whoever opens the folder next finishes or discards it.

While the bytes are copied every file that they belong to is sealed (`loratool.checkpoint.seal`): no program can load a model
that is neither the one before nor the one after. The seals are lifted last, when everything else is durable.
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
"""What of loratool's own an in-place change may add, replace or remove, beside ranges of weight files."""


@contextmanager
def locked(folder: Path, *, exclusive: bool) -> Iterator[None]:
    """Hold the folder against other loratool processes: several may read, one alone may change it.

    An interrupted change that is found is finished (or discarded, if it was not committed) first.

    Raises:
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
        # Some network file systems have no locks; a change in place needs one, reading goes on without.
        if exclusive:
            raise OutputError(f"cannot lock {quoted(folder)}: {error.strerror}; merge with --out instead") from None


def refuse_links(folder: Path, files: list[Path]) -> None:
    """Raise OutputError if the folder or one of its weight `files` is a link or shared with another name."""
    if folder.is_symlink():
        raise OutputError(f"{quoted(folder)} is a link, which loratool never writes through; merge with --out instead")
    for file in files:
        if file.is_symlink() or file.stat().st_nlink > 1:
            raise OutputError(
                f"{quoted(file)} is a link or has a second name (as in the Hub's cache), so a change in place would "
                "reach further than this folder; merge with --out instead"
            )


class _ObstacleError(ValueError):
    """Something about the folder that a prepared change meets, and what the user can do about it."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(what)
        self.advice = advice


@dataclass(frozen=True, slots=True)
class _Record:
    """What a commit says: the ranges of files and where their bytes lie in the redo log, what to remove, and the heads of the
    files, which are put back last; those of another version of loratool lack these."""

    ranges: Sequence[dict[str, Any]]
    remove: Sequence[str]
    heads: Mapping[str, Head]


class Journal:
    """A change of the files in `folder` that is being prepared; the folder must be `locked` exclusively.

    `reserve` gives room in the redo log for a range of a file; the caller writes the new bytes there, to `fd`. Files
    that the change adds are written below `new`. `commit` makes it happen; leaving the block without it discards all.
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
        """Room in the redo log for bytes ``start:stop`` of `file`; returns the offset in `fd` to write them at."""
        if not os.access(file, os.W_OK):
            raise OutputError(f"{quoted(file)} is read-only; make it writable, or write to --out instead")
        at = self._size
        self._ranges.append({"file": file.name, "start": start, "stop": stop, "at": at})
        self._size += stop - start
        return at

    def preallocate(self) -> None:
        """Claim the disk space for everything reserved, so that a full disk is noticed before work is done."""
        if self._size:
            try:
                os.posix_fallocate(self.fd, 0, self._size)
            except OSError as error:
                if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
                    raise _unwritable(self.folder, error) from None

    def ahead(self) -> list[Callable[[], None]]:
        """Jobs that put the old bytes into the room reserved, which makes the new ones quicker to write (`ModelCopy`)."""
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
        """Make the change durable and carry it out; `remove` names files or folders of loratool's own to take away.

        `check` is called when nobody else can open the files any more, and may raise. Ctrl-C waits until the change is
        carried out; a second one leaves it to whoever opens the folder next.

        Raises:
            OutputError: the disk is full, or another program has a file open; nothing has changed then.
        """
        # A repetition after a kill must not remove what the first try installed.
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
                with suppress(OSError):  # to finish it tries once more, and says what is wrong
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
        """Say why the change cannot be made, as long as it is not committed."""
        try:
            yield
        except ValueError as error:
            raise OutputError(
                f"{quoted(self.folder)} cannot be changed in place: {error}; write to --out instead"
            ) from None
        except OSError as error:
            raise (_unfinished(self.folder, error) if self._committed else _unwritable(self.folder, error)) from None


def recover(folder: Path) -> None:
    """Finish a committed change of `folder`, or discard one that was not; the folder must be `locked` exclusively.

    Raises:
        CheckpointError: the journal is not one that loratool could have written for this folder, or the folder has
            become one that the change cannot be finished in.
        OutputError: the change cannot be written.
    """
    journal = folder / JOURNAL
    if not os.path.lexists(journal):
        return  # another process was quicker
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
    """The committed change of `folder`, checked; errors as `recover`."""
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
    # From here on a repetition would find nothing to install; the commit goes first, then what it spoke of.
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
    """Take away what the change removes, and give what it adds its place."""
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
    """The record, of which nothing reaches outside the folder or what loratool owns in it.

    Raises:
        _ObstacleError: the folder is not as it was when the change was prepared.
        ValueError: says what does, or that the redo log is gone.
        OSError: the folder cannot be looked at.
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
    """Whether a name is that of a tokenizer's file or a chat template in the folder itself, which a merge may bring along."""
    return "/" not in name and role_of(name) in (FileRole.TOKENIZER, FileRole.CHAT_TEMPLATE)


def _check_head(file: Path, head: dict[str, Any]) -> None:
    """Raise _ObstacleError unless `file` is the one that began so when the change was prepared."""
    if type(head["length"]) is not int:
        raise ValueError(f"{quoted(file)} is in the way")
    fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        same = has_head(fd, head)
    finally:
        os.close(fd)
    if not same:
        raise _ObstacleError(f"{quoted(file)} is another file than it was", "put the file back that was there")


def _check_own_file(file: Path, stop: int) -> None:
    """Raise _ObstacleError unless `file` is a regular file of `stop` bytes or more that nothing else leads to or shares."""
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise _ObstacleError(f"{quoted(file)} is a link or no file", "put the file itself in its place")
    if status.st_nlink > 1:
        raise _ObstacleError(f"{quoted(file)} has a second name", "remove that")
    if status.st_size < stop:
        raise _ObstacleError(f"{quoted(file)} has become shorter", "put the whole file back")


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise _ObstacleError(f"{quoted(path)} is a link", "move that away")


def _how_it_ends(folder: Path) -> str:
    """What to say of a change that is committed and not carried out."""
    return (
        f"the change of {quoted(folder)} is prepared, and finished by the next loratool command on it; until then no program "
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
