"""The files of one adapter, found and parsed once: its weights, its configuration and loratool's facts.

An adapter is one file (safetensors or GGUF), a file with JSON beside it, or several shards under an index. Only headers and JSON
are read here; the kind and the format are identified later (`formats.table`).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from loratool.checkpoint.file_role import PICKLE_SUFFIXES
from loratool.checkpoint.file_state import FileState, states_of
from loratool.checkpoint.gguf import is_gguf, read_gguf_header
from loratool.checkpoint.header import Header, TensorInfo, read_header
from loratool.checkpoint.json_text import parse_json, read_json_object
from loratool.checkpoint.model import INDEX_SUFFIX, Checkpoint, has_file, read_index
from loratool.errors import AdapterError, CheckpointError, ElsewhereError, NotFoundError, quoted
from loratool.formats.adapter import sha256_of
from loratool.formats.adapter_names import (
    BESIDE,
    CONFIG_KEY,
    CONFIG_NAME,
    FACTS_KEY,
    FACTS_NAME,
    MODEL_CONFIG,
    NAMES_IN_FOLDERS,
    WEIGHTS_NAME,
    choose_weights,
    index_of_shard,
    natural,
    shards_in,
    single_files,
)
from loratool.formats.facts import without_files
from loratool.formats.joined import joined_content, joined_size, sha256_of_content
from loratool.formats.nested import no_adapter_in


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The files at a path that may be an adapter.

    Attributes:
        name: its folder's or file's name.
        weights: the files with its tensors; several if it is sharded.
        container: the file type of the weights.
        tensors: every tensor by name.
        metadata: the metadata in the weights' headers.
        config: the configuration: ``adapter_config.json``, or the JSON under ``adapter_config`` in the metadata.
        facts: loratool's facts: ``loratool.json``, or the JSON under ``loratool`` in the metadata.
        beside: the JSON files that belong to it, by name.
        index: the index of a sharded adapter.
        states: states of all these files when they were opened.
    """

    name: str
    weights: tuple[Path, ...]
    container: Literal["safetensors", "gguf"]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Path] = field(default_factory=dict)
    index: Path | None = None
    states: tuple[FileState, ...] = ()

    @property
    def file(self) -> Path:
        """The weights' file, or the index of several; errors name it."""
        return self.index or self.weights[0]

    @property
    def source(self) -> str:
        return str(self.file)

    @property
    def config_source(self) -> str:
        """The file that contains its configuration, for errors: the file beside the weights, or the weights themselves."""
        return str(self.beside.get(CONFIG_NAME, self.file))

    @property
    def size_bytes(self) -> int:
        """Size in bytes of its weights' file, or of the file that joins its shards."""
        return self.weights[0].stat().st_size if self.index is None else joined_size(self.tensors)

    def content(self) -> Iterator[bytes]:
        """Yield the bytes of the single file that a sharded adapter is kept as (`formats.joined`)."""
        return joined_content(self.tensors)

    def sha256(self) -> str:
        """Return the adapter's fingerprint: the sha256 of its weights' file, or of the file that joins its shards."""
        return sha256_of(self.weights[0]) if self.index is None else sha256_of_content(self.content())


def open_adapter(path: Path) -> AdapterFiles:
    """Find and parse the files of the adapter at `path`: a folder, a file, or an index of shards.

    Raises:
        NotFoundError: nothing is there.
        AdapterError: it is damaged or a pickle, or contains no adapter or several; the message says where adapters are.
    """
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise NotFoundError(f"there is no adapter at {quoted(path)}; give a file, a folder or a catalogued name")
    if path.name == CONFIG_NAME:
        return _folder(path.parent)
    if path.name.endswith(INDEX_SUFFIX):
        return _in_folder(path.parent, path.name)
    if path.suffix in PICKLE_SUFFIXES:
        raise AdapterError(pickle_advice(path))
    if path.name in NAMES_IN_FOLDERS and (path.parent / CONFIG_NAME).exists():
        return _in_folder(path.parent, path.name)
    _refuse_lone_shard(path)
    return _single(path)


def content_of_file(file: Path) -> Path | Iterator[bytes]:
    """Return the source of the bytes that an adapter's fingerprint covers: its file, or the joined content of its shards."""
    return open_adapter(file).content() if file.name.endswith(INDEX_SUFFIX) else file


def sha256_at(file: Path) -> str:
    """Return an adapter's fingerprint, given its file or its index of shards."""
    return open_adapter(file).sha256() if file.name.endswith(INDEX_SUFFIX) else sha256_of(file)


def size_of_file(file: Path) -> int:
    """Return the size in bytes of an adapter's file, or of the joined content of an index of shards."""
    return open_adapter(file).size_bytes if file.name.endswith(INDEX_SUFFIX) else file.stat().st_size


def pickle_advice(file: Path) -> str:
    how = (
        "load it with peft.PeftModel.from_pretrained and save it again with save_pretrained"
        if file.stem == Path(WEIGHTS_NAME).stem
        else "load it with the program that made it and save it as safetensors (in PEFT, with save_pretrained)"
    )
    return f"{quoted(file)} is a pickle, which can run code when it is opened, so loratool never does; where you trust it, {how}"


def _folder(folder: Path) -> AdapterFiles:
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise AdapterError(f"cannot read {quoted(folder)}: {error.strerror}") from None
    chosen = choose_weights([entry.name for entry in entries if entry.is_file()])
    if chosen is None:
        raise _why_no_adapter(folder, [entry.name for entry in entries])
    return _in_folder(folder, chosen)


def _in_folder(folder: Path, weights: str) -> AdapterFiles:
    """Open the adapter in a folder whose weights, or their index, are named `weights`, with the JSON beside them."""
    beside = {name: folder / name for name in BESIDE if os.path.lexists(folder / name)}
    states = states_of(beside.values())
    opened = _sharded(folder / weights) if weights.endswith(INDEX_SUFFIX) else _single(folder / weights)
    config = _json_file(beside[CONFIG_NAME]) if CONFIG_NAME in beside else opened.config
    facts = without_files(_json_file(folder / FACTS_NAME)) if (folder / FACTS_NAME).is_file() else opened.facts
    return replace(
        opened, name=folder.resolve().name, config=config, facts=facts, beside=beside, states=(*states, *opened.states)
    )


def _single(file: Path) -> AdapterFiles:
    try:
        if is_gguf(file):
            states = states_of([file])
            found = read_gguf_header(file)
            return AdapterFiles(file.stem, (file,), "gguf", found.tensors, found.metadata, states=states)
        header = read_header(file)
    except CheckpointError as error:
        raise AdapterError(str(error)) from None
    return AdapterFiles(
        file.stem,
        (file,),
        "safetensors",
        header.tensors,
        header.metadata,
        _metadata_json(header.metadata, CONFIG_KEY, file),
        _metadata_json(header.metadata, FACTS_KEY, file),
        states=_states([header]),
    )


def _sharded(index: Path) -> AdapterFiles:
    """Open an adapter in several shards, as transformers and PEFT write them."""
    described = states_of([index])
    try:
        shards = read_index(index)
        _refuse_missing(index, shards.values())
        headers = [read_header(index.parent / name) for name in sorted(set(shards.values()))]
        tensors = Checkpoint.of_headers(index.parent, headers, index, shards).tensors
    except CheckpointError as error:
        raise AdapterError(str(error)) from None
    metadata = {key: value for header in reversed(headers) for key, value in header.metadata.items()}
    files = tuple(header.file for header in headers)
    states = (*described, *_states(headers))
    name = index.name.removesuffix(INDEX_SUFFIX)
    return AdapterFiles(name, files, "safetensors", tensors, metadata, index=index, states=states)


def _states(headers: Iterable[Header]) -> tuple[FileState, ...]:
    return tuple(header.state for header in headers if header.state is not None)


def _refuse_missing(index: Path, shards: Iterable[str]) -> None:
    missing = [name for name in natural(set(shards)) if not has_file(index.parent / name)]
    if missing:
        raise AdapterError(
            f"{quoted(index)} lists the shard {quoted(missing[0])}, but there is no such file beside it"
            f"{f', nor {len(missing) - 1} more' if missing[1:] else ''}; download the adapter again"
        )


def _refuse_lone_shard(file: Path) -> None:
    index = index_of_shard(file.name)
    if index is not None and file.with_name(index).is_file():
        raise ElsewhereError(
            f"{quoted(file)} is one shard of an adapter; give its index {quoted(index)} or its folder",
            file,
            [file.parent],
        )


def _why_no_adapter(folder: Path, names: Collection[str]) -> AdapterError:
    pickles = [name for name in sorted(names) if Path(name).suffix in PICKLE_SUFFIXES]
    if pickles and (CONFIG_NAME in names or not single_files(names)):
        return AdapterError(pickle_advice(folder / pickles[0]))
    if CONFIG_NAME in names and not shards_in(names):
        return AdapterError(
            f"{quoted(folder)} has an {CONFIG_NAME} but no weights: there is no {WEIGHTS_NAME} beside it; download or save the "
            "adapter again"
        )
    return no_adapter_in(folder, sorted(names), is_model=MODEL_CONFIG in names)


def _json_file(file: Path) -> dict[str, Any]:
    try:
        return read_json_object(file)
    except CheckpointError as error:
        raise AdapterError(str(error)) from None


def _metadata_json(metadata: Mapping[str, str], key: str, file: Path) -> dict[str, Any]:
    if key not in metadata:
        return {}
    try:
        value = parse_json(metadata[key].encode())
    except ValueError as error:
        raise AdapterError(f"the metadata {key!r} of {quoted(file)}: {error}; save the adapter again") from None
    if not isinstance(value, dict):
        raise AdapterError(f"the metadata {key!r} of {quoted(file)} is not a JSON object; save the adapter again")
    return value
