"""Notes on the outputs that runs are writing, by which the remains of a killed run are found anywhere on disk.

A note is a small JSON file in a folder that the caller chooses (`noting_in`). It is written before its output appears, and
removed when the output is complete or gone. A live run holds a lock on its note, so an unlocked note belongs to a killed run.
If no note can be written, the run continues without one.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from loratool.interrupts import whole

SUFFIX: Final = ".json"
DRAFT_SUFFIX: Final = ".draft"
MOST_BYTES: Final = 1 << 20
"""Limit on the size of a note that is read, far above that of any real one."""

_folder: ContextVar[Path | None] = ContextVar("folder of the notes", default=None)


@contextmanager
def noting_in(folder: Path) -> Iterator[None]:
    """Write the notes of outputs that the block begins into `folder`, which the first note creates."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


class Note:
    """A note that exists while the block runs. `facts` must be JSON."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts = dict(facts)
        self._file: Path | None = None
        self._fd = -1

    @whole
    def __enter__(self) -> Self:
        folder = _folder.get()
        if folder is not None:
            with suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                self._file = folder / f"{secrets.token_hex(8)}{SUFFIX}"
            self.say(self.facts)
        return self

    @whole
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink(missing_ok=True)
        self._close()

    @whole
    def leave(self) -> None:
        """Keep the note and release its lock, for the run that takes over its output."""
        self._close()

    @whole
    def say(self, facts: Mapping[str, Any]) -> None:
        """Replace the content of the note; if that fails, the old content stays."""
        self.facts = dict(facts)
        if self._file is None:
            return
        draft = self._file.with_suffix(DRAFT_SUFFIX)
        fd = -1
        try:
            fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(fd, json.dumps({"process": _process(), **self.facts}).encode())
            os.rename(draft, self._file)  # so it is locked from the moment it appears
        except (OSError, UnicodeEncodeError):
            if fd >= 0:
                os.close(fd)
            return
        self._close()
        self._fd = fd

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True, slots=True)
class Unfinished:
    """The note of a killed run."""

    file: Path
    facts: Mapping[str, Any]

    @property
    def pid(self) -> int:
        """Process id of the run."""
        return int(self.facts["process"]["pid"])

    def forget(self) -> None:
        """Remove the note, once its output is complete or gone."""
        self.file.unlink(missing_ok=True)


@contextmanager
def taken_over(folder: Path) -> Iterator[list[Unfinished]]:
    """Yield the notes of dead runs in `folder`, locked against other processes until the block ends."""
    descriptors: list[int] = []
    try:
        found = []
        for file in _files(folder):
            with suppress(OSError):
                fd = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
                descriptors.append(fd)
                facts = _facts(fd)
                if facts is not None and _is_dead(fd, file, facts["process"]):
                    found.append(Unfinished(file, facts))
        yield found
    finally:
        for fd in descriptors:
            os.close(fd)


def are_in(folder: Path) -> bool:
    """Return whether `folder` holds any notes, of live or dead runs."""
    return bool(_files(folder))


def _files(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.name.endswith(SUFFIX))
    except OSError:
        return []


def _facts(fd: int) -> dict[str, Any] | None:
    """Return the content of a note; None if no run wrote it."""
    try:
        facts = json.loads(os.pread(fd, MOST_BYTES, 0))
        process = facts["process"]
        known: bool = isinstance(process["pid"], int) and {"machine", "boot", "space", "began"} <= set(process)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return facts if known else None


def _process() -> dict[str, Any]:
    """Return facts that identify this process among all others."""
    return {**_here(), "pid": os.getpid(), "began": _began(os.getpid())}


def _here() -> dict[str, str]:
    """Return the host name, the id of the machine's boot, and the namespace of its process ids (a container has its own)."""
    boot = space = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = str(Path("/proc/self/ns/pid").readlink())
    return {"machine": socket.gethostname(), "boot": boot, "space": space}


def _is_dead(fd: int, file: Path, process: Mapping[str, Any]) -> bool:
    """Return whether a note's process is certainly dead: it ran on this machine, and its lock is free.

    On file systems without locks, return whether the process no longer exists.
    """
    here = _here()
    same_machine = bool(process["machine"] == here["machine"] or process["boot"] == here["boot"])
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return same_machine and os.path.samestat(os.fstat(fd), os.lstat(file))
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:
        if process["boot"] != here["boot"]:
            return bool(process["machine"] == here["machine"])
        return bool(process["space"] == here["space"] and _began(process["pid"]) != process["began"])


def _began(pid: int) -> str | None:
    """Return when a process started, in clock ticks since boot; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
