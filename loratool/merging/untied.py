"""Untying in the merged model: the output head gets a tensor of its own, and the configuration says so.

A model that ties its head to its input embedding stores one matrix for both. If an adapter changes one of the two, or both
differently, the merged model needs two. The plan is made on an untied view of the base (`UntiedCheckpoint`), in which the head
has the embedding's bytes. Unmerging removes the head again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from loratool.architecture import Role, Spelling, any_model, architecture_of
from loratool.checkpoint.blocks import write_exactly
from loratool.checkpoint.copying import copy_range
from loratool.checkpoint.fingerprint import hash_tensor
from loratool.checkpoint.header import Header, parse_header
from loratool.checkpoint.layout import Layout, NewTensor, new_files, plan_layout
from loratool.checkpoint.model import Checkpoint
from loratool.checkpoint.model_copy import copy_file
from loratool.errors import CheckpointError, PlacementError, RestoreError, quoted
from loratool.formats.adapter import Adapter
from loratool.merging.changed_files import KEPT, FileChanges
from loratool.merging.stream import Place, Progress
from loratool.merging.ties import UNTIE, can_untie, how_to_untie
from loratool.merging.workers import Job

KEY: Final = "tie_word_embeddings"
CANONICAL_HEAD: Final = "lm_head.weight"
"""The name of an output head's weight in transformers' memory; the architecture tables know its name on disk."""
CONFIG_NAME: Final = "config.json"


@dataclass(frozen=True)
class UntiedCheckpoint(Checkpoint):
    """An untied view of a model that ties its head: `head` has the bytes of `embedding`.

    `original` is the model as stored.
    """

    original: Checkpoint | None = None
    embedding: str = ""
    head: str = ""

    @property
    def stored(self) -> Checkpoint:
        return self if self.original is None else self.original

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The configuration, with every setting that ties the two turned off."""
        config = dict(self.stored.config)
        text = config.get("text_config")
        return {**config, **({"text_config": {**text, KEY: False}} if isinstance(text, dict) else {}), KEY: False}

    def layout(self, touched: Collection[str] = ()) -> Layout:
        """Return the files of the untied model; the `touched` tensors are rewritten."""
        replaced = {}
        if self.head not in self.stored.tensors:
            info = self.tensors[self.embedding]
            replaced = {
                self.embedding: tuple(NewTensor(each, info.dtype, info.shape) for each in (self.embedding, self.head))
            }
        layout = plan_layout(self.stored, replaced)
        return replace(layout, kept=(layout.kept | {self.embedding}) - frozenset(touched) - {self.head})

    def files(self) -> FileChanges:
        """Return the files that replace the base's beside the weights: the configuration and the index of shards."""
        config = json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"
        written: dict[str, Path | bytes] = {CONFIG_NAME: config.encode()}
        index = self.layout().index()
        if index is not None and self.index is not None:
            written[self.index.name] = index
        return FileChanges(written, dict.fromkeys(written, UNTIE.strip("-")))


def stored_of(checkpoint: Checkpoint) -> Checkpoint:
    """Return the model as stored."""
    return checkpoint.stored if isinstance(checkpoint, UntiedCheckpoint) else checkpoint


def untied(base: Checkpoint, adapters: Iterable[Adapter]) -> UntiedCheckpoint:
    """Return an untied view of the base, whose head has the name that checkpoints of its family use.

    Raises:
        PlacementError: it ties no head, or is not a causal language model with one embedding and one head.
    """
    architecture = architecture_of(base.config, base.tensors)
    embeddings, heads = architecture.weights(Role.TOKENS), architecture.weights(Role.HEAD)
    is_tied = architecture.ties_embeddings is not False and (not heads or architecture.ties_embeddings is True)
    if not is_tied:
        raise PlacementError(f"{quoted(base.path)} does not tie its head to its embedding; omit {UNTIE}")
    if not can_untie(base):
        raise PlacementError(
            f"{quoted(base.path)} is not a model that {UNTIE} supports: a causal language model with one embedding and one head; "
            f"{how_to_untie(base)}"
        )
    named = [name for adapter in adapters for name in adapter.changes if any_model().role(name) is Role.HEAD]
    weights = [name for name in named if name.endswith(".weight")]
    canonical = architecture.canonical(next(iter(weights), CANONICAL_HEAD))
    return untied_as(base, embeddings[0], next(iter(heads), architecture.spelled(canonical, Spelling.STORED)))


def untied_as(base: Checkpoint, embedding: str, head: str) -> UntiedCheckpoint:
    """Return an untied view of the base in which `head` is a tensor of its own.

    Raises:
        PlacementError: it has no such embedding, or stores a head with other values.
    """
    info = base.tensors.get(embedding)
    if info is None:
        raise PlacementError(f"{quoted(base.path)} has no embedding {quoted(embedding)}")
    own = base.tensors.get(head)
    if own is not None and (
        (own.dtype, own.shape) != (info.dtype, info.shape) or hash_tensor(own) != hash_tensor(info)
    ):
        raise PlacementError(
            f"{quoted(base.path)} ties {quoted(head)} to {quoted(embedding)} and also stores another matrix for it, which no "
            "program uses; save the model again in transformers, and merge into that"
        )
    tensors = {**base.tensors, head: own or replace(info, name=head)}
    return UntiedCheckpoint(
        base.path, base.headers, MappingProxyType(tensors), base.index, base.described, base, embedding, head
    )


@dataclass(frozen=True, slots=True)
class NewWeights:
    """Weight files being written: the places of the tensors that change, and the jobs that copy the others."""

    places: Mapping[str, Place]
    copies: list[Job]


@contextmanager
def untied_files(base: UntiedCheckpoint, folder: Path, touched: Collection[str], others: Collection[Path],
                 progress: Progress) -> Iterator[NewWeights]:  # fmt: skip
    """Create the weight files of the untied model in the empty `folder`, with room for the `touched` tensors."""
    layout = base.layout(touched)
    with ExitStack() as stack:
        new = stack.enter_context(new_files(layout, folder, others, progress))
        places = {}
        for name in (*touched, base.head):
            there, info = layout.tensors[name], base.tensors[name]
            places[name] = Place(new.files[str(there.file)], there.start - info.start)
        copies: list[Job] = list(new.copies)
        if base.head not in touched:
            info, place = base.tensors[base.head], places.pop(base.head)
            source = os.open(info.file, os.O_RDONLY)
            stack.callback(os.close, source)
            at = info.start + place.shift
            copies.append(partial(copy_range, source, place.fd, info.start, info.stop, at=at, progress=progress))
        yield NewWeights(places, copies)


def keep_heads(base: Checkpoint, undo: Path) -> None:
    """Write the header bytes of each of the base's weight files into the undo folder."""
    for header in base.headers:
        with open(header.file, "rb") as stream:
            (undo / _kept_head(header.file.name)).write_bytes(stream.read(header.data_start))


def sizes_of(base: Checkpoint) -> dict[str, int]:
    """Return the sizes of a base's weight files in bytes, by name."""
    return {header.file.name: header.size for header in base.headers}


def kept_heads(undo: Path, sizes: Mapping[str, int]) -> dict[str, bytes]:
    """Read the header bytes of each of the base's weight files from the undo folder.

    Raises:
        RestoreError: one is missing.
    """
    try:
        return {name: (undo / _kept_head(name)).read_bytes() for name in sizes}
    except OSError:
        raise RestoreError(f"the headers of the base's files are missing from {quoted(undo)}") from None


def heads_of(base: Checkpoint) -> dict[str, bytes]:
    """Return the header bytes of each of a base's weight files."""
    found = {}
    for header in base.headers:
        with open(header.file, "rb") as stream:
            found[header.file.name] = stream.read(header.data_start)
    return found


def _kept_head(shard: str) -> str:
    return f"{KEPT}{shard}.head"


@contextmanager
def tied_files(merged: Checkpoint, heads: Mapping[str, bytes], sizes: Mapping[str, int], folder: Path,
               touched: Collection[str], others: Collection[Path], progress: Progress) -> Iterator[NewWeights]:  # fmt: skip
    """Create the tied base's weight files in the empty `folder`, from its headers and the `merged` model.

    Raises:
        RestoreError: the headers are damaged or are not the base's.
    """
    with ExitStack() as stack:
        places: dict[str, Place] = {}
        copies: list[Job] = [partial(copy_file, merged.folder / name, folder / name) for name in sorted(others)]
        sources: dict[Path, int] = {}
        for name, head in heads.items():
            header = _header(folder / name, head, sizes.get(name, 0))
            target = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            stack.callback(os.close, target)
            write_exactly(target, head, 0)
            os.truncate(target, header.size)
            for info in header.tensors.values():
                found = merged.tensors.get(info.name)
                if found is None or (found.dtype, found.shape) != (info.dtype, info.shape):
                    raise RestoreError(f"{quoted(info.name)} is not stored in {quoted(merged.path)} as in the base")
                if info.name in touched:
                    places[info.name] = Place(target, info.start - found.start)
                    continue
                if found.file not in sources:
                    sources[found.file] = os.open(found.file, os.O_RDONLY)
                    stack.callback(os.close, sources[found.file])
                source = sources[found.file]
                copies.append(
                    partial(copy_range, source, target, found.start, found.stop, at=info.start, progress=progress)
                )
        yield NewWeights(places, copies)


def _header(file: Path, head: bytes, size: int) -> Header:
    length = int.from_bytes(head[:8], "little")
    if len(head) != length + 8 or "/" in file.name or not file.name.endswith(".safetensors"):
        raise RestoreError(f"the header of the base's {quoted(file.name)} is damaged in the undo folder")
    try:
        return parse_header(head[8:], file, size)
    except CheckpointError as error:
        raise RestoreError(str(error)) from None
