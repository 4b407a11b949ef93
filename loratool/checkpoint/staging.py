"""Output that appears under its final name complete and durable, or not at all.

It is written under a temporary name beside the final one, fsynced and renamed. What a killed run left under the
temporary name is removed by the next run for the same output; two runs at once for one output are told apart by a lock.
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
"""renameat2(2): swap two names in one step (Linux)."""


@contextmanager
def staged_folder(out: Path, kind: OutputKind, *, force: bool = False) -> Iterator[Path]:
    """Give an empty folder to write into; when the block ends without an error it becomes `out`.

    Raises:
        OutputError: `out` exists (with `force`: and is not of this kind, or loratool did not write it), another run is
            writing it, or the disk is full or read-only.
        CheckpointError: a file that the block reads from elsewhere cannot be read.
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
    """Give a path to write a file at; when the block ends without an error it becomes `out`, which `option` gave.

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
    """What is written beside `out` under a temporary name: held by a lock, noted, and removed unless it is published.

    Entering and leaving are not torn by an interrupt, and neither is `publish`.
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
        """Give what was written its final name, durably.

        Raises:
            OutputError: somebody put another in its place meanwhile.
        """
        self._publish()
        self._published = True

    @abstractmethod
    def _claim(self, held: ExitStack) -> None:
        """Make the stage and lock it, for as long as `held` is open; take over what a killed run left."""

    @abstractmethod
    def _publish(self) -> None:
        """Rename it."""

    @abstractmethod
    def _discard(self) -> None:
        """Remove it."""

    def _remove_folders(self) -> None:
        """Remove the folders that were made above the output, where nothing came into them."""
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
            # Somebody may have put another there meanwhile.
            refuse_existing(self.out, self.kind, force=True, option=self.option)
        elif os.path.lexists(self.out):
            raise OutputError(f"{quoted(self.out)} appeared while it was being written; choose another {self.option}")
        os.replace(self.path, self.out)
        sync_folder(self.out.parent)

    def _discard(self) -> None:
        self.path.unlink(missing_ok=True)


def refuse_existing(out: Path, kind: OutputKind, *, force: bool, option: str = "--out") -> None:
    """Raise OutputError if an output of this kind must not be written to `out`.

    Something is there, and `force` is off, or loratool did not write it, or it is of another kind.
    """
    refuse_impossible(out, option)
    if not os.path.lexists(out):
        return
    try:
        reason = why_not_replaced(out, kind)
    except OSError as error:
        reason = f"cannot be looked at ({error.strerror})"
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
    """Raise OutputError if no file can have the name of `out`: it holds a zero byte, or what is no character."""
    try:
        possible = b"\0" not in os.fsencode(out)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise OutputError(f"{quoted(out)} is no name for a file or folder; choose another {option}")


def refuse_no_text(sources: Iterable[Path]) -> None:
    """Raise CheckpointError if the name of one of the `sources` is no text, which a manifest could not hold."""
    for path in sources:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise CheckpointError(f"the name {quoted(path)} is no valid text; write it in UTF-8") from None


def foreign_file(error: OSError, own: tuple[Path, ...]) -> str | None:
    """The file that `error` names, if it has nothing to do with the `own` paths: is none, in none and above none."""
    if not isinstance(error.filename, str | bytes | os.PathLike):
        return None
    file = Path(os.path.abspath(os.fsdecode(error.filename)))
    related = any(file.is_relative_to(path) or path.is_relative_to(file) for path in own)
    return None if related else os.fsdecode(error.filename)


def unreadable(file: str, error: OSError) -> CheckpointError:
    """What to say when a file that an output is made from cannot be read."""
    return CheckpointError(f"cannot read {quoted(file)}: {error.strerror or error}; mend that and run again")


def partials_of(out: Path) -> list[Path]:
    """What a run that was killed left of `out`, under temporary names beside it."""
    return [path for path in (_beside(out, "partial"), _beside(out, "replaced")) if os.path.lexists(path)]


def clear_partials(out: Path) -> int:
    """Remove what a run that was killed left of `out`, unless another run has taken it over; how many bytes that were.

    Where the run was killed in the middle of a replacement, what it replaced is put back.
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
    """Bytes of a file, or of all files below a folder; 0 where nothing is there."""
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_size if os.path.lexists(path) else 0
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())


def sync_tree(folder: Path) -> None:
    """Make every file and folder under `folder` durable."""
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
    """Make `folder` and the folders above it that are not there, all of them durable; those that were made, deepest first."""
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
    """Hold the lock on `stage`, unless another run does, or published or removed it while this one waited."""
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
            # Somebody may have put a file into it since the run began.
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
    """Finish a replacement that was killed between its two renames, on systems that cannot exchange two names.

    Whether the folder that was to be replaced is back.
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
    """Swap two names in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    at_cwd = -100
    return bool(renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), RENAME_EXCHANGE) == 0)
