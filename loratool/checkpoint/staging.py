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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from loratool.checkpoint.copying import sync_folder
from loratool.checkpoint.output_kind import OutputKind, why_not_replaced
from loratool.errors import CheckpointError, OutputError, quoted

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
        _make_folder(out.parent)
        stage = _beside(out, "partial")
        _put_back_replaced(out)
        with _claimed(stage, out):
            try:
                yield stage
                sync_tree(stage)
                _publish_folder(stage, out, kind, force=force)
            except BaseException:
                shutil.rmtree(stage, ignore_errors=True)
                raise


@contextmanager
def staged_file(out: Path, kind: OutputKind, *, force: bool = False, option: str = "--out") -> Iterator[Path]:
    """Give a path to write a file at; when the block ends without an error it becomes `out`, which `option` gave.

    Raises:
        OutputError: as `staged_folder`.
    """
    out = Path(os.path.abspath(out))
    with _explained(out, option):
        refuse_existing(out, kind, force=force, option=option)
        _make_folder(out.parent)
        stage = _beside(out, "partial")
        with _locked(stage, out, os.O_RDWR | os.O_CREAT, option):
            try:
                yield stage
                sync_file(stage)
                if force:
                    refuse_existing(
                        out, kind, force=True, option=option
                    )  # somebody may have put another there meanwhile
                elif os.path.lexists(out):
                    raise OutputError(f"{quoted(out)} appeared while it was being written; choose another {option}")
                os.replace(stage, out)
                sync_folder(out.parent)
            except BaseException:
                stage.unlink(missing_ok=True)
                raise


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


def _make_folder(folder: Path) -> None:
    """Make `folder` and the folders above it that are not there, all of them durable."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(new):
        sync_folder(path.parent)


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
def _claimed(stage: Path, out: Path) -> Iterator[None]:
    """Hold the lock on an empty `stage`, taking over what a killed run left."""
    stage.mkdir(exist_ok=True)
    with _locked(stage, out, os.O_RDONLY | os.O_DIRECTORY):
        for entry in os.scandir(stage):
            shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
        yield


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


def _put_back_replaced(out: Path) -> None:
    """Finish a replacement that was killed between its two renames, on systems that cannot exchange two names."""
    replaced = _beside(out, "replaced")
    if replaced.is_dir():
        if os.path.lexists(out):
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, out)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    at_cwd = -100
    return bool(renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), RENAME_EXCHANGE) == 0)
