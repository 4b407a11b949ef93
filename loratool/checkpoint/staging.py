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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from loratool.checkpoint.copying import sync_folder
from loratool.errors import OutputError, quoted

RENAME_EXCHANGE: Final = 2
"""renameat2(2): swap two names in one step (Linux)."""

OWN_FILE: Final = "loratool.json"
"""A folder that holds this was written by loratool, and `force` may replace it."""


@contextmanager
def staged_folder(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Give an empty folder to write into; when the block ends without an error it becomes `out`.

    Raises:
        OutputError: `out` exists (with `force`: and is not one that loratool wrote), another run is writing it, or the
            disk is full or read-only.
    """
    out = Path(os.path.abspath(out))
    with _explained(out):
        refuse_existing(out, force=force)
        if out.exists() and not out.is_dir():
            raise OutputError(f"{quoted(out)} is a file and the output is a folder; choose another --out")
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = _beside(out, "partial")
        _put_back_replaced(out)
        with _claimed(stage, out):
            try:
                yield stage
                sync_tree(stage)
                _publish_folder(stage, out, force=force)
            except BaseException:
                shutil.rmtree(stage, ignore_errors=True)
                raise


@contextmanager
def staged_file(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a path to write a file at; when the block ends without an error it becomes `out`.

    Raises:
        OutputError: as `staged_folder`.
    """
    out = Path(os.path.abspath(out))
    with _explained(out):
        refuse_existing(out, force=force)
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = _beside(out, "partial")
        with _locked(stage, out, os.O_RDWR | os.O_CREAT):
            try:
                yield stage
                _sync_file(stage)
                if not force and os.path.lexists(out):
                    raise OutputError(f"{quoted(out)} appeared while it was being written; choose another --out")
                os.replace(stage, out)
                sync_folder(out.parent)
            except BaseException:
                stage.unlink(missing_ok=True)
                raise


def refuse_existing(out: Path, *, force: bool) -> None:
    """Raise OutputError if `out` must not be written: it is there, and `force` is off or it is somebody else's."""
    refuse_impossible(out)
    if not os.path.lexists(out):
        return
    if not force:
        raise OutputError(f"{quoted(out)} exists already; choose another --out, or give --force to replace it")
    if out.is_symlink():
        raise OutputError(f"{quoted(out)} is a link, which loratool never writes through; choose another --out")
    if Path.cwd().is_relative_to(out):
        raise OutputError(f"{quoted(out)} holds the folder that you work in; choose another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / OWN_FILE).exists():
        raise OutputError(
            f"{quoted(out)} is a folder that loratool did not write, so --force does not replace it; "
            "remove it yourself or choose another --out"
        )


def refuse_impossible(out: Path) -> None:
    """Raise OutputError if no file can have the name of `out`: it holds a zero byte, or what is no character."""
    try:
        possible = b"\0" not in os.fsencode(out)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise OutputError(f"{quoted(out)} is no name for a file or folder; choose another --out")


def sync_tree(folder: Path) -> None:
    """Make every file and folder under `folder` durable."""
    for root, _, files in os.walk(folder):
        for name in files:
            _sync_file(Path(root) / name)
        sync_folder(root)


def _sync_file(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _beside(out: Path, what: str) -> Path:
    return out.parent / f".{out.name}.loratool-{what}"


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = "free some space" if error.errno in {errno.ENOSPC, errno.EDQUOT} else "choose another place with --out"
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
def _locked(stage: Path, out: Path, flags: int) -> Iterator[None]:
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
            raise OutputError(f"another run is using {quoted(out)}; wait for it, or choose another --out") from None
        yield
    finally:
        os.close(fd)


def _publish_folder(stage: Path, out: Path, *, force: bool) -> None:
    if not os.path.lexists(out):
        os.rename(stage, out)
    elif not force:
        raise OutputError(f"{quoted(out)} appeared while it was being written; choose another --out")
    else:
        with _locked(out, out, os.O_RDONLY | os.O_DIRECTORY):
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
