"""A model on disk: its safetensors files, its index, its configuration and the other files in its folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from loratool.checkpoint.file_role import PICKLE_SUFFIXES, FileRole, role_of
from loratool.checkpoint.file_state import FileState, states_of
from loratool.checkpoint.header import JOURNAL, Header, TensorInfo, read_header
from loratool.checkpoint.json_text import LARGEST_LISTING, read_json_object
from loratool.errors import CheckpointError, NotFoundError, quoted

WEIGHTS_NAME: Final = "model.safetensors"
INDEX_SUFFIX: Final = ".safetensors.index.json"
CONFIG_NAME: Final = "config.json"

NAME_BYTES: Final = 255
PATH_BYTES: Final = 4096
"""Limits on the length of a file name and of a path, in bytes (Linux)."""

BOOKKEEPING: Final = frozenset({".git", ".cache", JOURNAL})
"""Folders in which download tools and loratool keep their state. They do not belong to the model."""


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one model and their folder.

    Attributes:
        path: the model's folder, or the single safetensors file of the whole model.
        headers: the checked headers of its safetensors files, sorted by name.
        tensors: every tensor of the model by name.
        index: the index file that lists the shards, if there is one.
        described: states of its configuration and index, taken before they were read.
    """

    path: Path
    headers: tuple[Header, ...]
    tensors: Mapping[str, TensorInfo]
    index: Path | None
    described: tuple[FileState, ...] = ()

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read the headers of the model at `path`: a folder, or a single safetensors file.

        Raises:
            NotFoundError: there is nothing at `path`.
            CheckpointError: there is no safetensors model, or it is damaged or incomplete.
        """
        if path.is_file():
            if path.suffix in PICKLE_SUFFIXES:
                raise CheckpointError(_pickle_advice(path))
            return cls._of_files(path, (read_header(path),), None)
        if not path.is_dir():
            raise NotFoundError(
                f"there is no model at {quoted(path)}; give a folder, a safetensors file or a known name"
            )
        index = path / choose_weights([file.name for file in path.iterdir()], path)
        described = states_of([path / CONFIG_NAME, index])
        if not index.name.endswith(INDEX_SUFFIX):
            return replace(cls._of_files(path, (read_header(index),), None), described=described)
        shards = read_index(index)
        for shard in shards.values():
            if not has_file(path / shard):
                raise CheckpointError(
                    f"{quoted(index)} names {quoted(shard)}, which is not there; download the model again"
                )
        headers = [read_header(path / name) for name in sorted(set(shards.values()))]
        return replace(cls.of_headers(path, headers, index, shards), described=described)

    @classmethod
    def of_headers(
        cls, path: Path, headers: Iterable[Header], index: Path | None, shards: Mapping[str, str]
    ) -> Checkpoint:
        """Return the model whose files have these headers. The files themselves need not exist; a plan needs no more.

        `shards` is the content of `index`: tensor name to file name, and empty for a model of one file.

        Raises:
            CheckpointError: a tensor occurs twice, or is not in the file that the index names.
        """
        checkpoint = cls._of_files(path, tuple(headers), index)
        for tensor, shard in shards.items():
            found = checkpoint.tensors.get(tensor)
            if found is None or found.file.name != shard:
                raise CheckpointError(
                    f"{quoted(index)} says that {quoted(tensor)} is in {quoted(shard)}, but it is not there; "
                    "download the model again"
                )
        return checkpoint

    @classmethod
    def _of_files(cls, path: Path, headers: tuple[Header, ...], index: Path | None) -> Checkpoint:
        tensors: dict[str, TensorInfo] = {}
        for header in headers:
            for name, info in header.tensors.items():
                if name in tensors:
                    raise CheckpointError(
                        f"the tensor {quoted(name)} is in both {quoted(tensors[name].file.name)} and "
                        f"{quoted(info.file.name)} of {quoted(path)}; keep one of them"
                    )
                tensors[name] = info
        return cls(path, headers, MappingProxyType(tensors), index)

    @property
    def folder(self) -> Path:
        """The folder that holds the weights."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def states(self) -> tuple[FileState, ...]:
        """States of all files that the model is read from, taken when they were opened."""
        return (*self.described, *(header.state for header in self.headers if header.state is not None))

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data in the model."""
        return sum(info.nbytes for info in self.tensors.values())

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The content of the model's ``config.json``; empty if there is no such file."""
        file = self.path / CONFIG_NAME
        if not self.path.is_dir() or not file.is_file():
            return {}
        return read_json_object(file)

    def other_files(self) -> Iterator[Path]:
        """Yield the sorted paths, relative to the folder, of all files but the model's weight files.

        Raises:
            CheckpointError: the folder holds something that cannot be copied safely, such as a link to a folder or a socket.
        """
        if not self.path.is_dir():
            return
        weights = {header.file.name for header in self.headers}
        for file in sorted(_walk(self.path)):
            relative = file.relative_to(self.path)
            if str(relative) not in weights:
                yield relative


def can_be_file(path: Path) -> bool:
    """Return whether `path` is a possible file name: it can be encoded, and neither it nor a part of it is too long."""
    try:
        parts = [os.fsencode(part) for part in path.parts]
    except UnicodeEncodeError:
        return False
    if any(len(part) > NAME_BYTES or b"\0" in part for part in parts):
        return False
    return len(os.fsencode(os.path.abspath(path))) < PATH_BYTES


def has_file(path: Path) -> bool:
    """Return whether there is a file at `path`; False for impossible names (too long, with a zero byte)."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_file(entry: os.DirEntry[str]) -> bool:
    """Return whether a folder's entry is a file or leads to one; a link that leads in a circle or nowhere does not."""
    try:
        return entry.is_file()
    except OSError:
        return False


def _walk(folder: Path) -> Iterator[Path]:
    for entry in os.scandir(folder):
        try:
            mode = entry.stat().st_mode
        except OSError as error:
            raise CheckpointError(
                f"{quoted(entry.path)} cannot be read ({error.strerror}); remove it from the model"
            ) from None
        if stat.S_ISDIR(mode):
            if entry.name in BOOKKEEPING:
                continue
            if entry.is_symlink():
                raise CheckpointError(f"{quoted(entry.path)} is a link to a folder; replace it by the folder itself")
            yield from _walk(Path(entry.path))
        elif stat.S_ISREG(mode):
            yield Path(entry.path)
        else:
            raise CheckpointError(f"{quoted(entry.path)} is neither a file nor a folder; remove it from the model")


def _may_be_weights(name: str) -> bool:
    return name.endswith((".safetensors", INDEX_SUFFIX)) or Path(name).suffix in PICKLE_SUFFIXES


def choose_weights(names: Collection[str], folder: Path | str) -> str:
    """Return the file that holds or lists a folder's weights; like transformers, prefer a single file to an index.

    `folder` is named in errors.

    Raises:
        CheckpointError: there is no such file, or more than one.
    """
    for preferred in (WEIGHTS_NAME, "model" + INDEX_SUFFIX):
        if preferred in names:
            return preferred
    # An adapter's files are no model's weights. If there are no others, opening one of them gives the better error.
    others = [name for name in names if role_of(name) is not FileRole.ADAPTER]
    names = others if any(map(_may_be_weights, others)) else names
    indexes = sorted(name for name in names if name.endswith(INDEX_SUFFIX))
    files = sorted(name for name in names if name.endswith(".safetensors"))
    if len(indexes) == 1:
        return indexes[0]
    if len(files) == 1 and not indexes:
        return files[0]
    if files:
        several = ", ".join(quoted(name, 40) for name in (indexes or files)[:4])
        raise CheckpointError(f"{quoted(folder)} holds several models ({several}); name one file")
    for name in sorted(names):
        if Path(name).suffix in PICKLE_SUFFIXES:
            raise CheckpointError(_pickle_advice(f"{folder}/{name}"))
    raise CheckpointError(f"{quoted(folder)} holds no safetensors weights; give the folder of a saved model")


def _pickle_advice(file: Path | str) -> str:
    return (
        f"{quoted(file)} is a pickle, which can run code when it is opened, so loratool never does; "
        "load the model where you trust it and save it with model.save_pretrained(folder)"
    )


def read_index(file: Path) -> dict[str, str]:
    """Return an index's map from tensor name to shard: a plain file name in the index's own folder.

    Raises:
        CheckpointError: the file cannot be read, or is not such an index.
    """
    if not file.is_file():
        raise CheckpointError(f"{quoted(file)} is not a regular file; download the model again")
    content = read_json_object(file, LARGEST_LISTING)
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{quoted(file)} has no weight_map; download the model again")
    for tensor, shard in shards.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise CheckpointError(
                f"{quoted(file)} puts {quoted(tensor)} into {quoted(shard)}, which is not a safetensors file in its own "
                "folder; do not use this model"
            )
    return shards


def _is_plain_name(name: str) -> bool:
    return name.endswith(".safetensors") and not any(c in name for c in "/\\\0") and name not in {".", ".."}
