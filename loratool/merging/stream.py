"""Stream matrices through a change, several at once: read a block of rows, change its bytes, write it.

Each worker handles one matrix at a time and its blocks in order, so digests are computed while streaming. Matrices run in
parallel; inside a block everything runs on one thread, because threads that meet at barriers starve each other on a
shared machine.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from blake3 import blake3

from loratool.checkpoint.blocks import read_exactly
from loratool.checkpoint.direct_io import SLACK_BYTES, TensorWriter, skip_to_lie_as_at
from loratool.errors import CheckpointError, quoted
from loratool.merging.plan import Target
from loratool.merging.workers import Job, cpu_workers, work_through

if TYPE_CHECKING:
    import torch

Progress = Callable[[int], None]
"""Called, from any thread, with the number of bytes of the model done since the last call."""


class Change(Protocol):
    """The change of one matrix, block by block."""

    def blocks(self) -> Iterator[range]:
        """Yield the blocks of rows, in order, which together cover all rows."""

    def buffer(self, nbytes: int) -> torch.Tensor:
        """Return a new CPU buffer for the bytes of a block, uint8, (nbytes,), pinned if the device needs it."""

    def change(self, rows: range, parts: tuple[torch.Tensor, ...]) -> None:
        """Change the bytes of a block in place: one uint8 CPU tensor for each extent of the stored matrix."""


@runtime_checkable
class MeasuringChange(Change, Protocol):
    """A change that may depend on the whole matrix."""

    @property
    def measures(self) -> bool:
        """Whether `measure` must see all blocks, in order, before the first `change`."""

    def measure(self, rows: range, parts: tuple[torch.Tensor, ...]) -> None:
        """Look at the bytes of a block, which stay."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's new bytes go: the open file `fd`, at their offset in the source plus `shift`.

    `direct` is the same file opened to bypass the page cache, if possible (`loratool.checkpoint.direct_io`).
    """

    fd: int
    shift: int = 0
    direct: int | None = None

    def writer(self) -> TensorWriter:
        return TensorWriter(self.fd, self.direct)


@dataclass(frozen=True, slots=True)
class Digests:
    """BLAKE3 of one tensor's bytes before and after a change."""

    before: str
    after: str


def stream(targets: Iterable[Target], change: Callable[[Target], Change], places: Mapping[str, Place], *,
           progress: Progress, beside: Iterable[Job] = (), ahead: Iterable[Job] = (),
           known: Mapping[str, str] = MappingProxyType({})) -> dict[str, Digests]:  # fmt: skip
    """Stream every target through its change, and write its tensors to their places; tensors without a place are only hashed.

    `beside` and `ahead` are other jobs of the same workers (`work_through`). `known` are digests of unchanged tensors, by name,
    which are not computed again. Returns the digests of the targets' tensors, by name.
    """
    digests: dict[str, Digests] = {}
    targets = sorted(targets, key=lambda target: -target.nbytes)
    computing = sum(target.nbytes for target in targets if target.weight.is_computing)

    def one(target: Target, stop: threading.Event) -> None:
        digests.update(_stream(target, change(target), places, known, progress, stop))

    work_through(
        [partial(one, target) for target in targets],
        workers=cpu_workers(computing=2 * computing > sum(target.nbytes for target in targets)),
        beside=beside,
        ahead=ahead,
        files={place.fd for place in places.values() if place.direct is None},
    )
    return digests


def _stream(target: Target, change: Change, places: Mapping[str, Place], known: Mapping[str, str],
            progress: Progress, stop: threading.Event) -> dict[str, Digests]:  # fmt: skip
    weight = target.weight
    before = {info.name: blake3() for info in weight.tensors if info.name not in known}
    after = {info.name: blake3() for info in weight.tensors}
    writers = {name: places[name].writer() for name in after if name in places}
    buffers: list[torch.Tensor] = []
    with opened({info.file for info in weight.tensors}) as sources:
        if isinstance(change, MeasuringChange) and change.measures:
            _measure(target, change, sources, stop)
        for rows in change.blocks():
            if stop.is_set():
                break
            extents = weight.extents(rows)
            room = [end - start + SLACK_BYTES for _, start, end in extents]
            if not buffers or any(len(buffer) < size for buffer, size in zip(buffers, room, strict=True)):
                buffers = [change.buffer(size) for size in room]
            blocks = []
            for buffer, (info, start, end) in zip(buffers, extents, strict=True):
                skip = skip_to_lie_as_at(buffer, start + (places[info.name].shift if info.name in places else 0))
                blocks.append(slice(skip, skip + end - start))
            parts = tuple(buffer[block] for buffer, block in zip(buffers, blocks, strict=True))
            views = [bytes_of(part) for part in parts]
            for (info, start, _), view in zip(extents, views, strict=True):
                read_exactly(sources[info.file], view, start)
                if info.name in before:
                    before[info.name].update(view)
            change.change(rows, parts)
            for (info, start, _), view, buffer, block in zip(extents, views, buffers, blocks, strict=True):
                after[info.name].update(view)
                if info.name in writers:
                    writers[info.name].write(bytes_of(buffer), block, start + places[info.name].shift)
                progress(len(view))
        else:
            for writer in writers.values():
                writer.close()
    found = {name: hasher.hexdigest() for name, hasher in before.items()}
    return {name: Digests(found.get(name) or known[name], hasher.hexdigest()) for name, hasher in after.items()}


def _measure(target: Target, change: MeasuringChange, sources: Mapping[Path, int], stop: threading.Event) -> None:
    """Read the whole matrix once for a change that depends on all of it."""
    buffers: list[torch.Tensor] = []
    for rows in change.blocks():
        if stop.is_set():
            break
        extents = target.weight.extents(rows)
        sizes = [end - start for _, start, end in extents]
        if not buffers or any(len(buffer) < size for buffer, size in zip(buffers, sizes, strict=True)):
            buffers = [change.buffer(size) for size in sizes]
        parts = tuple(buffer[:size] for buffer, size in zip(buffers, sizes, strict=True))
        for (info, start, _), part in zip(extents, parts, strict=True):
            read_exactly(sources[info.file], bytes_of(part), start)
        change.measure(rows, parts)


def bytes_of(part: torch.Tensor) -> memoryview:
    """Return the bytes of a uint8 CPU tensor, sharing its memory."""
    array: Any = part.numpy()
    return memoryview(array)


@contextmanager
def opened(files: Iterable[Path]) -> Iterator[dict[Path, int]]:
    """Open `files` for reading, and yield their file descriptors."""
    with ExitStack() as stack:
        descriptors = {}
        for file in files:
            try:
                descriptors[file] = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"cannot read {quoted(file)}: {error.strerror}") from None
            stack.callback(os.close, descriptors[file])
        yield descriptors
