"""The fingerprint of a base model, which identifies its tensors regardless of their files.

It is BLAKE3 over one line of JSON for each tensor, ``["name","BF16",[2048,2048],"<BLAKE3 of its bytes>"]``, sorted by
name. Sharding, file names and metadata have no influence.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from blake3 import blake3

from loratool.checkpoint.blocks import read_exactly
from loratool.checkpoint.file_state import FileState, refuse_changed_meanwhile
from loratool.checkpoint.header import Header, TensorInfo
from loratool.checkpoint.json_text import LARGEST_LISTING, read_json_object
from loratool.checkpoint.model import Checkpoint
from loratool.checkpoint.threads import in_threads
from loratool.errors import CheckpointError
from loratool.interrupts import check, whole

READ_BYTES: Final = 1 << 20
RACE_SECONDS: Final = 0.05
"""Age, in seconds, below which a file's digests are not cached: it could change again within one tick of its time stamp."""


def fingerprint(tensors: Mapping[str, TensorInfo], digests: Mapping[str, str]) -> str:
    """Return the fingerprint of `tensors` whose bytes have the BLAKE3 `digests`, as 64 hexadecimal digits."""
    hasher = blake3()
    for name in sorted(tensors):
        line = [name, tensors[name].dtype, list(tensors[name].shape), digests[name]]
        hasher.update(json.dumps(line, separators=(",", ":")).encode() + b"\n")
    return str(hasher.hexdigest())


def file_digest(file: Path) -> str:
    """Return the BLAKE3 digest of a whole file, as 64 hexadecimal digits."""
    hasher = blake3()
    hasher.update_mmap(file)
    return str(hasher.hexdigest())


class DigestCache:
    """Cache in `folder` of the BLAKE3 digests of tensors: one small JSON file for each file of weights.

    An entry is valid while the file's path, size, times and inode are unchanged. If the cache cannot be read or written,
    digests are computed again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, header: Header) -> dict[str, str] | None:
        """Return the digests of every tensor in the file of `header`, by name; None if they are not cached."""
        try:
            entry = read_json_object(self._entry(header.file), LARGEST_LISTING)
            if entry["file"] == _identity(FileState.of(header.file)) and set(entry["digests"]) == set(header.tensors):
                return dict(entry["digests"])
        except (CheckpointError, OSError, ValueError, KeyError, TypeError):
            pass
        return None

    @whole
    def put(self, header: Header, digests: Mapping[str, str]) -> None:
        """Store the digests of a file's tensors, unless the file has changed since its header was read."""
        state = header.state
        if state is None or time.time() - max(state.mtime_ns, state.ctime_ns) / 1e9 < RACE_SECONDS:
            return
        try:
            if FileState.of(header.file) != state:
                return
        except OSError:
            return
        entry = self._entry(header.file)
        temporary = entry.with_suffix(f".{os.getpid()}.tmp")
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"file": _identity(state), "digests": dict(digests)}))
            temporary.replace(entry)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _entry(self, file: Path) -> Path:
        return self.folder / f"{blake3(os.fsencode(file.resolve())).hexdigest()[:32]}.json"


def _identity(state: FileState) -> list[str | int]:
    """Return the facts that must match for an entry to be valid. A restart can change device numbers, so they are left out."""
    return [str(state.file.resolve()), state.size, state.mtime_ns, state.ctime_ns, state.inode]


def tensor_digests(checkpoint: Checkpoint, cache: DigestCache | None = None, *,
                   progress: Callable[[int], None] = lambda count: None) -> dict[str, str]:  # fmt: skip
    """Return the BLAKE3 digest of the bytes of every tensor of `checkpoint`, by name.

    One thread per core reads the files that are not in `cache`. `progress` receives the number of bytes hashed since its
    last call.

    Raises:
        CheckpointError: a file cannot be read, or changed while it was read.
    """
    known: dict[str, str] = {}
    unknown: list[Header] = []
    for header in checkpoint.headers:
        digests = cache.get(header) if cache else None
        if digests is None:
            unknown.append(header)
        else:
            known |= digests
            progress(sum(info.nbytes for info in header.tensors.values()))
    known |= _hash(_largest_first(unknown), progress)
    refuse_changed_meanwhile(checkpoint.states)
    for header in unknown:
        if cache:
            cache.put(header, {name: known[name] for name in header.tensors})
    return known


def _largest_first(headers: Iterable[Header]) -> list[TensorInfo]:
    return sorted((info for header in headers for info in header.tensors.values()), key=lambda info: -info.nbytes)


def _hash(tensors: list[TensorInfo], progress: Callable[[int], None]) -> dict[str, str]:
    digests = in_threads(lambda info: hash_tensor(info, progress), tensors, os.cpu_count() or 1)
    return {info.name: digest for info, digest in zip(tensors, digests, strict=True)}


def hash_tensor(info: TensorInfo, progress: Callable[[int], None] = lambda count: None) -> str:
    """Return the BLAKE3 digest of one tensor's bytes, as 64 hexadecimal digits.

    Raises:
        CheckpointError: its file cannot be read.
    """
    try:
        fd = os.open(info.file, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"cannot read {info.file}: {error.strerror}") from None
    try:
        return hash_range(fd, info.start, info.stop, progress)
    finally:
        os.close(fd)


def hash_range(fd: int, start: int, stop: int, progress: Callable[[int], None] = lambda count: None) -> str:
    """Return the BLAKE3 digest of bytes ``start:stop`` of the open file `fd`, as 64 hexadecimal digits."""
    hasher = blake3()
    buffer = memoryview(bytearray(min(READ_BYTES, stop - start)))
    for at in range(start, stop, READ_BYTES):
        check()
        part = buffer[: min(READ_BYTES, stop - at)]
        read_exactly(fd, part, at)
        hasher.update(part)
        progress(len(part))
    return str(hasher.hexdigest())
