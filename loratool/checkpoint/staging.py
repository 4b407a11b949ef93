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
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

from loratool.checkpoint.copying import sync_folder
from loratool.checkpoint.header import read_header
from loratool.checkpoint.json_text import LARGEST_LISTING, read_json_object
from loratool.errors import CheckpointError, OutputError, quoted

RENAME_EXCHANGE: Final = 2
"""renameat2(2): swap two names in one step (Linux)."""

# A merge's manifest and an adapter's facts have this name, too, by constants of rooms that this one does not import.
OWN_FILE: Final = "loratool.json"
"""A folder that holds this was written by loratool, and `force` may replace it if this accounts for all that is in it."""

UNDO_FOLDER: Final = "loratool-undo"
ADAPTER_FILES: Final = frozenset({"adapter_config.json", "adapter_model.safetensors"})
WEIGHT_SUFFIXES: Final = (".safetensors", ".safetensors.index.json")

OWN_METADATA: Final = ("adapter_config", "loratool", "ss_")
"""How a key begins in the metadata of each safetensors file that loratool writes alone: an adapter's, in its own layout or
kohya's, or a training's state."""

FIRST_BYTES: Final = {".pdf": b"%PDF-", ".png": b"\x89PNG\r\n\x1a\n"}
"""What a picture begins with, by its suffix."""


@contextmanager
def staged_folder(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Give an empty folder to write into; when the block ends without an error it becomes `out`.

    Raises:
        OutputError: `out` exists (with `force`: and is not one that loratool wrote), another run is writing it, or the
            disk is full or read-only.
        CheckpointError: a file that the block reads from elsewhere cannot be read.
    """
    out = Path(os.path.abspath(out))
    with _explained(out):
        refuse_existing(out, force=force)
        if out.exists() and not out.is_dir():
            raise OutputError(f"{quoted(out)} is a file and the output is a folder; choose another --out")
        _make_folder(out.parent)
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
def staged_file(out: Path, *, force: bool = False, option: str = "--out") -> Iterator[Path]:
    """Give a path to write a file at; when the block ends without an error it becomes `out`, which `option` gave.

    Raises:
        OutputError: as `staged_folder`.
    """
    out = Path(os.path.abspath(out))
    with _explained(out, option):
        refuse_existing(out, force=force, option=option)
        _make_folder(out.parent)
        stage = _beside(out, "partial")
        with _locked(stage, out, os.O_RDWR | os.O_CREAT, option):
            try:
                yield stage
                sync_file(stage)
                if force:
                    refuse_existing(out, force=True, option=option)  # somebody may have put another there meanwhile
                elif os.path.lexists(out):
                    raise OutputError(f"{quoted(out)} appeared while it was being written; choose another {option}")
                os.replace(stage, out)
                sync_folder(out.parent)
            except BaseException:
                stage.unlink(missing_ok=True)
                raise


def refuse_existing(out: Path, *, force: bool, option: str = "--out") -> None:
    """Raise OutputError if `out` must not be written: it is there, and `force` is off or it is somebody else's."""
    refuse_impossible(out, option)
    if not os.path.lexists(out):
        return
    if not force:
        raise OutputError(f"{quoted(out)} exists already; choose another {option}, or give --force to replace it")
    if out.is_symlink():
        raise OutputError(f"{quoted(out)} is a link, which loratool never writes through; choose another {option}")
    if Path.cwd().is_relative_to(out):
        raise OutputError(f"{quoted(out)} holds the folder that you work in; choose another {option}")
    reason = _why_not_our_folder(out) if out.is_dir() else _why_not_our_file(out)
    if reason is not None:
        raise OutputError(
            f"{quoted(out)} {reason}, so --force does not replace it; remove it yourself or choose another {option}"
        )


def _why_not_our_folder(folder: Path) -> str | None:
    """Why `folder` is not one that loratool made, or is more than that; None if losing it loses nothing else."""
    if not any(folder.iterdir()):
        return None
    if not (folder / OWN_FILE).is_file():
        return "is a folder that loratool did not write"
    try:
        record = read_json_object(folder / OWN_FILE, LARGEST_LISTING)
    except CheckpointError:
        return f"has a {OWN_FILE} that loratool did not write"
    if record.get("in_place"):
        return "is a model of your own that was changed in place"
    foreign = next((name for name in _names_in(folder) if not _is_accounted_for(name, record)), None)
    return None if foreign is None else f"holds {quoted(foreign)}, which loratool did not write"


def _why_not_our_file(file: Path) -> str | None:
    """Why `file` is not one that loratool made, by its first bytes; None if it may be one, or holds nothing."""
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
        return "is no regular file"
    if status.st_size == 0:
        return None
    if file.suffix in {".safetensors", ".st"}:
        try:
            ours = any(key.startswith(OWN_METADATA) for key in read_header(file).metadata)
        except CheckpointError:
            ours = False
    else:
        first = FIRST_BYTES.get(file.suffix, b"")
        with open(file, "rb") as stream:
            ours = stream.read(len(first)) == first
    return None if ours else "is a file that loratool did not write"


def _names_in(folder: Path) -> Iterator[str]:
    """The paths below `folder` of everything that is not a folder, in order; OSError where it cannot look."""

    def stop(error: OSError) -> NoReturn:
        raise error

    for root, folders, files in os.walk(folder, onerror=stop):
        folders.sort()
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in sorted([*files, *links]):
            yield str((Path(root) / name).relative_to(folder))


def _is_accounted_for(name: str, record: dict[str, Any]) -> bool:
    if name == OWN_FILE:
        return True
    if "files" not in record:
        return name in ADAPTER_FILES
    is_weights = "/" not in name and name.endswith(WEIGHT_SUFFIXES)
    files = record["files"]
    return is_weights or name.startswith(f"{UNDO_FOLDER}/") or (isinstance(files, dict) and name in files)


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


def _publish_folder(stage: Path, out: Path, *, force: bool) -> None:
    if not os.path.lexists(out):
        os.rename(stage, out)
    elif not force:
        raise OutputError(f"{quoted(out)} appeared while it was being written; choose another --out")
    else:
        with _locked(out, out, os.O_RDONLY | os.O_DIRECTORY):
            # Somebody may have put a file into it since the run began.
            refuse_existing(out, force=True)
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
