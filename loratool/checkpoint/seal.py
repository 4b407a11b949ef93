"""Weight files that no program loads while they change: the length of their header is one that no file can have.

A program that opens a sealed file finds a header of 2**64 - 1 bytes and refuses it, as the format asks. One that had opened it
before would see bytes change under it; so a file is sealed while no other program has it open, which a lease tells (fcntl(2),
F_SETLEASE): until it is given back, whoever opens the file waits.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from blake3 import blake3

from loratool.checkpoint.blocks import read_exactly
from loratool.checkpoint.header import SEAL
from loratool.errors import CheckpointError, OutputError, quoted

F_SETSIG: Final = 10
"""fcntl(2): the signal that says that somebody waits for a lease; SIGURG, which does nothing where nobody handles it."""

Head = dict[str, Any]
"""What a file begins with: the ``length`` of its header, in bytes, and the BLAKE3 ``digest`` of that header."""


def head_of(fd: int, file: Path) -> Head:
    """The head of an open weight file that is not sealed."""
    start = memoryview(bytearray(8))
    read_exactly(fd, start, 0)
    length = int.from_bytes(start, "little")
    if length > os.fstat(fd).st_size:
        raise CheckpointError(f"the header of {quoted(file)} is damaged; download the model again")
    return {"length": length, "digest": _digest(fd, length)}


def has_head(fd: int, head: Head) -> bool:
    """Whether an open file, sealed or not or in between, is the one that had this head."""
    start = os.pread(fd, len(SEAL), 0)
    halfway = zip(start, _prefix(head), SEAL, strict=False)
    if (
        len(start) < len(SEAL)
        or any(byte not in either for byte, *either in halfway)
        or not 0 <= head["length"] <= os.fstat(fd).st_size
    ):
        return False
    return bool(_digest(fd, head["length"]) == head["digest"])


def seal(files: Iterable[int]) -> None:
    """Seal open files, durably."""
    _begin_with({fd: SEAL for fd in files if os.pread(fd, len(SEAL), 0) != SEAL})


def unseal(heads: Mapping[int, Head]) -> None:
    """Give open files the beginning that they had, durably."""
    _begin_with({fd: _prefix(head) for fd, head in heads.items()})


def _begin_with(starts: Mapping[int, bytes]) -> None:
    for fd, start in starts.items():
        if os.pwrite(fd, start, 0) != len(start):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
    for fd in starts:
        os.fsync(fd)


def _prefix(head: Head) -> bytes:
    return int(head["length"]).to_bytes(8, "little")


def _digest(fd: int, length: int) -> str:
    text = memoryview(bytearray(length))
    read_exactly(fd, text, 8)
    return str(blake3(text).hexdigest())


@contextmanager
def leased(files: Iterable[Path]) -> Iterator[dict[Path, int]]:
    """Open `files` for writing, with nobody else: whoever opens one meanwhile waits for the end of the block.

    Where the file system has no leases, or the files are another user's, they are just opened.

    Raises:
        OutputError: another program has one of them open.
    """
    with ExitStack() as stack:
        opened = {}
        for file in files:
            opened[file] = fd = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
            stack.callback(os.close, fd)
            try:
                with contextlib.suppress(OSError):
                    fcntl.fcntl(fd, F_SETSIG, signal.SIGURG)
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            except BlockingIOError:
                raise OutputError(
                    f"{quoted(file)} is open in {_who_has(fd)}, which would see it change in the middle; close that, or write "
                    "to --out instead"
                ) from None
            except OSError:
                continue
        yield opened


def _who_has(fd: int) -> str:
    """Which other program has the file `fd` open, or mapped into its memory, as far as this user may know."""
    wanted = os.fstat(fd)
    for pid in sorted(filter(str.isdigit, os.listdir("/proc")), key=int):
        own = int(pid) == os.getpid()
        if _has_open(pid, wanted, but={fd} if own else set()):
            with contextlib.suppress(OSError):
                name = Path(f"/proc/{pid}/comm").read_text().strip()
                return "this program itself" if own else f"another program ({quoted(name)}, process {pid})"
    return "another program"


def _has_open(pid: str, wanted: os.stat_result, but: set[int]) -> bool:
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if int(entry.name) not in but and os.path.samestat(entry.stat(), wanted):
                    return True
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            fields = line.split()
            if len(fields) > 4 and fields[4] == str(wanted.st_ino) and _device(fields[3]) == wanted.st_dev:
                return True
    return False


def _device(text: str) -> int:
    major, _, minor = text.partition(":")
    return os.makedev(int(major, 16), int(minor, 16))
