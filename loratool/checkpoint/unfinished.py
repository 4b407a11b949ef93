"""Notes of what runs are writing, so that what a killed run left is found wherever it lies.

A note is a small JSON file in a folder that the caller names (`noting_in`). It is written before its subject appears, and
removed when that is complete or gone. While the run lives it holds a lock on its note: one that nobody holds is of a run that
was killed. Where no note can be written the run goes on without.
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
"""No note comes near."""

_folder: ContextVar[Path | None] = ContextVar("folder of the notes", default=None)


@contextmanager
def noting_in(folder: Path) -> Iterator[None]:
    """Have what is begun inside the block noted in `folder`, which is made with the first note."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


class Note:
    """A note that is there while the block runs; `facts` are JSON."""

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
        """Leave the note where it is, for whoever takes over what it speaks of."""
        self._close()

    @whole
    def say(self, facts: Mapping[str, Any]) -> None:
        """Have the note say this instead; where it cannot be written, it says what it said."""
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
            os.rename(draft, self._file)  # whoever finds it finds it locked
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
    """What a run that was killed had noted."""

    file: Path
    facts: Mapping[str, Any]

    @property
    def pid(self) -> int:
        """Of the run."""
        return int(self.facts["process"]["pid"])

    def forget(self) -> None:
        """Remove the note: what it spoke of is complete or gone."""
        self.file.unlink(missing_ok=True)


@contextmanager
def taken_over(folder: Path) -> Iterator[list[Unfinished]]:
    """Give the notes in `folder` of runs that are dead; no other process takes them over meanwhile."""
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
    """Whether there are notes at all, of living runs or of dead ones."""
    return bool(_files(folder))


def _files(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.name.endswith(SUFFIX))
    except OSError:
        return []


def _facts(fd: int) -> dict[str, Any] | None:
    """What a note says; None where that is nothing a run wrote."""
    try:
        facts = json.loads(os.pread(fd, MOST_BYTES, 0))
        process = facts["process"]
        known: bool = isinstance(process["pid"], int) and {"machine", "boot", "space", "began"} <= set(process)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return facts if known else None


def _process() -> dict[str, Any]:
    """What tells this process from all others."""
    return {**_here(), "pid": os.getpid(), "began": _began(os.getpid())}


def _here() -> dict[str, str]:
    """This machine, since when it runs, and the space in which its processes have their numbers (a container's own)."""
    boot = space = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = str(Path("/proc/self/ns/pid").readlink())
    return {"machine": socket.gethostname(), "boot": boot, "space": space}


def _is_dead(fd: int, file: Path, process: Mapping[str, Any]) -> bool:
    """Whether the process of a note is dead, for sure: nobody holds its lock, and it was a process of this machine.

    Where there are no locks, it is dead if it is not there any more.
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
    """When a process began, in ticks since the machine was started; None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
