"""Output that appears under its final name complete and durable, or not at all.

It is written under a temporary name beside the final one, fsynced and renamed. The next run for the same output removes the
remains of a killed one. A lock keeps two runs from writing one output at the same time.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from loratool.checkpoint.copying import sync_folder
from loratool.checkpoint.output_kind import OutputKind, why_not_replaced
from loratool.checkpoint.unfinished import Note
from loratool.errors import CheckpointError, OutputError, quoted
from loratool.interrupts import note, whole

RENAME_EXCHANGE: Final = 2
"""Flag of renameat2(2) that swaps two names in one step (Linux)."""


@contextmanager
def staged_folder(out: Path, kind: OutputKind, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder to write into, which becomes `out` when the block ends without an error.

    Raises:
        OutputError: `out` exists (with `force`: if it is of another kind, or loratool did not write it), another run is
            writing it, or the disk is full or read-only.
        CheckpointError: a file outside the output that the block reads cannot be read.
    """
    out = Path(os.path.abspath(out))
    with _explained(out):
        refuse_existing(out, kind, force=force)
        with _FolderStage(out, kind, force=force) as stage:
            yield stage.path
            sync_tree(stage.path)
            stage.publish()


@contextmanager
def staged_file(out: Path, kind: OutputKind, *, force: bool = False, option: str = "--out") -> Iterator[Path]:
    """Yield a path to write a file at, which becomes `out` when the block ends without an error.

    `option` is the command line option of `out`, for messages.

    Raises:
        OutputError: as `staged_folder`.
    """
    out = Path(os.path.abspath(out))
    with _explained(out, option):
        refuse_existing(out, kind, force=force, option=option)
        with _FileStage(out, kind, force=force, option=option) as stage:
            yield stage.path
            sync_file(stage.path)
            stage.publish()


class _Stage(ABC):
    """An output under a temporary name beside `out`: locked, noted, and removed unless it is published.

    No interrupt is raised in the middle of entering, leaving or `publish`.
    """

    def __init__(self, out: Path, kind: OutputKind, *, force: bool, option: str = "--out") -> None:
        self.out, self.kind, self.force, self.option = out, kind, force, option
        self.path = _beside(out, "partial")
        self._note = Note({"what": "output", "out": str(out)})
        self._made: list[Path] = []
        self._held = ExitStack()
        self._published = False

    @whole
    def __enter__(self) -> Self:
        with ExitStack() as undoing:
            undoing.callback(self._remove_folders)
            self._made = _make_folder(self.out.parent)
            self._held.enter_context(self._note)
            undoing.callback(self._held.close)
            self._claim(self._held)
            undoing.pop_all()
        return self

    @whole
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self._published:
                self._discard()
        finally:
            self._held.close()
            if not self._published:
                self._remove_folders()
        if error is not None:
            out = quoted(self.out)
            note(error, f"{out} is complete" if self._published else f"the unfinished {out} is removed")

    @whole
    def publish(self) -> None:
        """Rename the output to its final name and make that durable.

        Raises:
            OutputError: another file or folder has appeared there.
        """
        self._publish()
        self._published = True

    @abstractmethod
    def _claim(self, held: ExitStack) -> None:
        """Create the stage and lock it while `held` is open; clear the remains of a killed run."""

    @abstractmethod
    def _publish(self) -> None:
        """Rename the stage to the output."""

    @abstractmethod
    def _discard(self) -> None:
        """Remove the stage."""

    def _remove_folders(self) -> None:
        """Remove the folders that were created for the output, if they are empty."""
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()


class _FolderStage(_Stage):
    def _claim(self, held: ExitStack) -> None:
        self.path.mkdir(exist_ok=True)
        held.enter_context(_locked(self.path, self.out, os.O_RDONLY | os.O_DIRECTORY))
        if _put_back_replaced(self.out):
            refuse_existing(self.out, self.kind, force=self.force)
        for entry in os.scandir(self.path):
            shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)

    def _publish(self) -> None:
        _publish_folder(self.path, self.out, self.kind, force=self.force)

    def _discard(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class _FileStage(_Stage):
    def _claim(self, held: ExitStack) -> None:
        held.enter_context(_locked(self.path, self.out, os.O_RDWR | os.O_CREAT, self.option))

    def _publish(self) -> None:
        if self.force:
            # Another program may have put a file there since the run began.
            refuse_existing(self.out, self.kind, force=True, option=self.option)
        elif os.path.lexists(self.out):
            raise OutputError(f"{quoted(self.out)} appeared while it was being written; choose another {self.option}")
        os.replace(self.path, self.out)
        sync_folder(self.out.parent)

    def _discard(self) -> None:
        self.path.unlink(missing_ok=True)


def refuse_existing(out: Path, kind: OutputKind, *, force: bool, option: str = "--out") -> None:
    """Raise OutputError if `out` exists and must not be replaced by an output of this kind.

    It must not without `force`, if loratool did not write it, or if it is of another kind.
    """
    refuse_impossible(out, option)
    if not os.path.lexists(out):
        return
    try:
        reason = why_not_replaced(out, kind)
    except OSError as error:
        reason = f"cannot be accessed ({error.strerror})"
    if reason is None and not force:
        raise OutputError(f"{quoted(out)} exists already; choose another {option}, or give --force to replace it")
    if reason is None:
        return
    if force:
        raise OutputError(
            f"{quoted(out)} {reason}, so --force does not replace it; remove it yourself or choose another {option}"
        )
    raise OutputError(f"{quoted(out)} exists already and {reason}; choose another {option}")


def refuse_impossible(out: Path, option: str = "--out") -> None:
    """Raise OutputError if no file can have the name `out`: it holds a zero byte, or cannot be encoded."""
    try:
        possible = b"\0" not in os.fsencode(out)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise OutputError(f"{quoted(out)} is not a valid name for a file or folder; choose another {option}")


def refuse_no_text(sources: Iterable[Path]) -> None:
    """Raise CheckpointError if the name of one of the `sources` is not valid text, so that no manifest could hold it."""
    for path in sources:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise CheckpointError(f"the name {quoted(path)} is not valid text; write it in UTF-8") from None


def foreign_file(error: OSError, own: tuple[Path, ...]) -> str | None:
    """Return the file that `error` names, or None if that is one of the `own` paths, below one, or above one."""
    if not isinstance(error.filename, str | bytes | os.PathLike):
        return None
    file = Path(os.path.abspath(os.fsdecode(error.filename)))
    related = any(file.is_relative_to(path) or path.is_relative_to(file) for path in own)
    return None if related else os.fsdecode(error.filename)


def unreadable(file: str, error: OSError) -> CheckpointError:
    """Return the error for a source file that cannot be read."""
    return CheckpointError(f"cannot read {quoted(file)}: {error.strerror or error}; fix that and run again")


def partials_of(out: Path) -> list[Path]:
    """Return the remains of a killed run for `out`, under temporary names beside it."""
    return [path for path in (_beside(out, "partial"), _beside(out, "replaced")) if os.path.lexists(path)]


def clear_partials(out: Path) -> int:
    """Remove the remains of a killed run for `out`, unless another run uses them; return the bytes freed.

    If the run was killed while it replaced a folder, the old folder is restored.
    """
    freed, stage = 0, _beside(out, "partial")
    with suppress(OSError, OutputError):
        size = size_of(stage)
        with _locked(stage, out, os.O_RDONLY):
            shutil.rmtree(stage) if stage.is_dir() else stage.unlink()
            freed += size
    with suppress(OSError):
        size = size_of(_beside(out, "replaced"))
        if not _put_back_replaced(out):
            freed += size
    return freed


def size_of(path: Path) -> int:
    """Return the size in bytes of a file, or of all files below a folder; 0 if `path` does not exist."""
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_size if os.path.lexists(path) else 0
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())


def sync_tree(folder: Path) -> None:
    """Make every file and folder below `folder` durable."""
    for root, _, files in os.walk(folder):
        for name in files:
            sync_file(Path(root) / name)
        sync_folder(root)


def sync_file(file: Path) -> None:
    """Make the content of a file durable."""
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_folder(folder: Path) -> list[Path]:
    """Create `folder` and missing folders above it, durably; return the new ones, deepest first."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(new):
        sync_folder(path.parent)
    return new


def _beside(out: Path, what: str) -> Path:
    return out.parent / f".{out.name}.loratool-{what}"


@contextmanager
def _explained(out: Path, option: str = "--out") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        source = foreign_file(error, (out, _beside(out, "partial"), _beside(out, "replaced")))
        if source is not None:
            raise unreadable(source, error) from None
        advice = (
            "free some space" if error.errno in {errno.ENOSPC, errno.EDQUOT} else f"choose another place with {option}"
        )
        raise OutputError(f"cannot write {quoted(out)}: {error.strerror or error}; {advice}") from None


@contextmanager
def _locked(stage: Path, out: Path, flags: int, option: str = "--out") -> Iterator[None]:
    """Hold the lock on `stage`.

    Raises:
        OutputError: another run holds it, or has just published or removed the stage.
    """
    fd = os.open(stage, flags | os.O_NOFOLLOW, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(fd), os.lstat(stage))
        except (BlockingIOError, FileNotFoundError):
            ours = False
        except OSError:
            ours = True  # some network file systems have no locks
        if not ours:
            raise OutputError(f"another run is using {quoted(out)}; wait for it, or choose another {option}") from None
        yield
    finally:
        os.close(fd)


def _publish_folder(stage: Path, out: Path, kind: OutputKind, *, force: bool) -> None:
    if not os.path.lexists(out):
        os.rename(stage, out)
    elif not force:
        raise OutputError(f"{quoted(out)} appeared while it was being written; choose another --out")
    else:
        with _locked(out, out, os.O_RDONLY | os.O_DIRECTORY):
            # Another program may have put a file into it since the run began.
            refuse_existing(out, kind, force=True)
            _replace_folder(stage, out)
    sync_folder(out.parent)


def _replace_folder(stage: Path, out: Path) -> None:
    if _exchange(stage, out):
        sync_folder(out.parent)
        shutil.rmtree(stage)
    else:
        replaced = _beside(out, "replaced")
        os.rename(out, replaced)
        os.rename(stage, out)
        sync_folder(out.parent)
        shutil.rmtree(replaced)


def _put_back_replaced(out: Path) -> bool:
    """Finish a replacement that was killed between its two renames (`_replace_folder`).

    Return whether the replaced folder is back under its name.
    """
    replaced = _beside(out, "replaced")
    if not replaced.is_dir():
        return False
    if os.path.lexists(out):
        shutil.rmtree(replaced)
        return False
    os.rename(replaced, out)
    return True


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; return False if the system does not support it."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    at_cwd = -100
    return bool(renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), RENAME_EXCHANGE) == 0)
