"""The files of a new model whose tensors differ from its base's in dtype, size or number.

What replaces a tensor goes into the file of the same name as the base's file with that tensor. The layout is made from
headers alone, so that the place of every byte is known before a matrix is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loratool.checkpoint.blocks import write_exactly
from loratool.checkpoint.copying import copy_range
from loratool.checkpoint.dtypes import DTYPES
from loratool.checkpoint.header import Header, TensorInfo, header_bytes, nbytes
from loratool.checkpoint.json_text import LARGEST_LISTING, read_json_object
from loratool.checkpoint.model import Checkpoint
from loratool.checkpoint.model_copy import copy_file, pieces


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to write. `dtype` is a name of safetensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to write: its first bytes, and its `tensors` in file order; their `file` is a plain name."""

    source: Header
    head: bytes
    tensors: tuple[TensorInfo, ...]

    @property
    def name(self) -> str:
        return self.source.file.name

    @property
    def size(self) -> int:
        return self.tensors[-1].stop if self.tensors else len(self.head)


@dataclass(frozen=True)
class Layout:
    """All files of a model to write.

    Attributes:
        base: the model it is made from.
        shards: in the order of the base's headers.
        tensors: every tensor of the new model by name. `file` is the name of its shard, without a folder.
        kept: names of the tensors whose bytes are the base's.
    """

    base: Checkpoint
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorInfo]
    kept: frozenset[str]

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data in the new model."""
        return sum(info.nbytes for info in self.tensors.values())

    def index(self) -> bytes | None:
        """Return the new content of the index file; None if the base has no index."""
        if self.base.index is None:
            return None
        content = read_json_object(self.base.index, LARGEST_LISTING)
        metadata = content.get("metadata")
        content["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": self.nbytes}
        content["weight_map"] = {name: str(info.file) for name, info in self.tensors.items()}
        return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def plan_layout(base: Checkpoint, replaced: Mapping[str, Sequence[NewTensor]]) -> Layout:
    """Return the layout of `base` with new tensors for each name in `replaced`; an empty sequence removes the tensor."""
    shards = tuple(_shard(header, replaced) for header in base.headers)
    tensors = {info.name: info for shard in shards for info in shard.tensors}
    return Layout(base, shards, tensors, frozenset(tensors.keys() - _new_names(replaced)))


def _new_names(replaced: Mapping[str, Sequence[NewTensor]]) -> set[str]:
    return {new.name for tensors in replaced.values() for new in tensors}


def _shard(header: Header, replaced: Mapping[str, Sequence[NewTensor]]) -> Shard:
    """Lay out one file in safetensors' own order: by decreasing element size, which aligns all tensors, then by name."""
    new = [
        tensor
        for info in header.tensors.values()
        for tensor in replaced.get(info.name, (NewTensor(info.name, info.dtype, info.shape),))
    ]
    new.sort(key=lambda tensor: (-DTYPES[tensor.dtype].bits, tensor.name))
    head = header_bytes({tensor.name: (tensor.dtype, tensor.shape) for tensor in new}, header.metadata)
    start, placed = len(head), []
    for tensor in new:
        stop = start + tensor.nbytes
        placed.append(TensorInfo(tensor.name, tensor.dtype, tensor.shape, Path(header.file.name), start, stop))
        start = stop
    return Shard(header, head, tuple(placed))


@dataclass(frozen=True, slots=True)
class NewFiles:
    """The files of a layout by name, open for writing, and the jobs that copy the kept bytes."""

    files: Mapping[str, int]
    copies: Sequence[Callable[[], None]]


@contextmanager
def new_files(layout: Layout, folder: Path, others: Collection[Path],
              progress: Callable[[int], None]) -> Iterator[NewFiles]:  # fmt: skip
    """Create the files and the index of `layout` in the empty `folder`, with space for the new tensors.

    `others` are further files to copy, as paths relative to the base's folder.
    """
    with ExitStack() as stack:
        files: dict[str, int] = {}
        copies: list[Callable[[], None]] = []
        for shard in layout.shards:
            source = os.open(shard.source.file, os.O_RDONLY)
            stack.callback(os.close, source)
            target = os.open(folder / shard.name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            stack.callback(os.close, target)
            write_exactly(target, shard.head, 0)
            if shard.size > len(shard.head):
                os.posix_fallocate(target, len(shard.head), shard.size - len(shard.head))
            files[shard.name] = target
            for start, stop, at in _kept_ranges(shard, layout.kept):
                copies += [
                    partial(copy_range, source, target, *piece, at=at + piece[0] - start, progress=progress)
                    for piece in pieces(start, stop)
                ]
        copies += [partial(copy_file, layout.base.folder / name, folder / name) for name in sorted(others)]
        index = layout.index()
        if index is not None and layout.base.index is not None:
            (folder / layout.base.index.name).write_bytes(index)
        yield NewFiles(files, copies)


def _kept_ranges(shard: Shard, kept: Collection[str]) -> Iterator[tuple[int, int, int]]:
    """Yield the start and stop of kept bytes in the source, and their new offset; ranges adjacent in both are joined."""
    begin = end = at = 0
    for info in shard.tensors:
        if info.name not in kept:
            continue
        source = shard.source.tensors[info.name]
        if source.start == end and info.start == at + end - begin:
            end = source.stop
            continue
        if begin < end:
            yield begin, end, at
        begin, end, at = source.start, source.stop, info.start
    if begin < end:
        yield begin, end, at
