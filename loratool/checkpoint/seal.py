"""Sealing of weight files, so that no program loads them while they change.

A sealed file claims a header of 2**64 - 1 bytes, which every reader of safetensors must refuse. A program that opened the file
earlier would still see its bytes change. So a file is sealed under a lease (fcntl(2), F_SETLEASE): the lease is granted only
while no other program has the file open, and makes others wait to open it until it is released.
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
"""Command of fcntl(2) that sets the signal sent when another program waits for a lease. SIGURG is ignored by default."""

Head = dict[str, Any]
"""Identity of a weight file: the ``length`` of its header in bytes, and the header's BLAKE3 ``digest``."""


def head_of(fd: int, file: Path) -> Head:
    """Return the head of an open weight file that is not sealed.

    Raises:
        CheckpointError: its header is longer than the file.
    """
    start = memoryview(bytearray(8))
    read_exactly(fd, start, 0)
    length = int.from_bytes(start, "little")
    if length > os.fstat(fd).st_size:
        raise CheckpointError(f"the header of {quoted(file)} is damaged; download the model again")
    return {"length": length, "digest": _digest(fd, length)}


def has_head(fd: int, head: Head) -> bool:
    """Return whether an open file had this head, even if it is now sealed, fully or in part."""
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
    """Seal open files and make that durable."""
    _begin_with({fd: SEAL for fd in files if os.pread(fd, len(SEAL), 0) != SEAL})


def unseal(heads: Mapping[int, Head]) -> None:
    """Restore the first bytes of open files and make that durable."""
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
    """Open `files` for writing under leases: a program that opens one of them waits until the block ends.

    No lease is taken where the file system has none, or where another user owns the file.

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
                    f"{quoted(file)} is open in {_who_has(fd)}, which would see it change; close that, or write to --out instead"
                ) from None
            except OSError:
                continue
        yield opened


def _who_has(fd: int) -> str:
    """Describe the program that has the file `fd` open or mapped into memory, as far as this user may see it."""
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
