"""Base models on the Hub: known by their headers, which are read by range, and downloaded when their weights are needed."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratool.checkpoint.header import MAX_HEADER_BYTES, Header, parse_header, read_header
from loratool.checkpoint.model import INDEX_SUFFIX, Checkpoint, choose_weights, read_index
from loratool.checkpoint.threads import in_threads
from loratool.errors import CheckpointError, HubError, NotFoundError, quoted
from loratool.hub.address import HubAddress, is_safe
from loratool.hub.download import Watcher, fetch, is_cached
from loratool.hub.errors import hub_errors
from loratool.hub.repository import COMMIT, SHA256, HubFile, Snapshot, cache_folder, look

if TYPE_CHECKING:
    from huggingface_hub import HfFileSystem

MODEL_FILES: Final = ("*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "*.tiktoken")
"""What a model folder needs beside its weights; pickles and other frameworks' weights stay on the Hub."""

HEADERS_AT_ONCE: Final = 8
FIRST_BYTES: Final = 1 << 17
"""What is asked of a file at first; most headers are shorter."""


def fetch_config(address: HubAddress, command: str) -> Path:
    """The ``config.json`` of a model repository, and nothing else of it.

    Raises:
        NotFoundError, HubError: it is not there, or cannot be downloaded.
    """
    return fetch(look(address, command), ["config.json"], command) / "config.json"


class HeaderCache:
    """The headers of safetensors files on the Hub, in `folder`, by the sha256 of the file that each begins.

    One that cannot be read or written is no error: the Hub is asked again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, file: HubFile) -> bytes | None:
        """The JSON text of a file's header, or None."""
        try:
            return self._entry(file).read_bytes()
        except OSError:
            return None

    def put(self, file: HubFile, text: bytes) -> None:
        """Remember the JSON text of a file's header."""
        draft = self._entry(file).with_suffix(f".{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(text)
            draft.replace(self._entry(file))
        except OSError:
            with suppress(OSError):
                draft.unlink(missing_ok=True)

    def _entry(self, file: HubFile) -> Path:
        return self.folder / f"{file.sha256 or file.blob_id}.json"


@dataclass(frozen=True, slots=True)
class HubWeights:
    """The files that hold the weights of a base, by name, and the index that lists them, if there is one."""

    index: str | None
    files: Mapping[str, HubFile]

    @property
    def are_known(self) -> bool:
        """Whether the Hub says enough of every file to check a download."""
        return all(file.is_known for file in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """What a catalogue keeps: of each file its size in bytes, and its sha256 or git's id."""
        return {
            name: {"size": file.size, **({"sha256": file.sha256} if file.sha256 else {"blob_id": file.blob_id})}
            for name, file in sorted(self.files.items())
        }


def find_weights(snapshot: Snapshot, command: str) -> HubWeights:
    """Which files of a snapshot are its weights. The index is downloaded, where there is one.

    Raises:
        CheckpointError: it holds no safetensors weights, or more than one model.
        HubError: the index cannot be downloaded.
    """
    names = snapshot.names_in("")
    if "adapter_config.json" in names and "config.json" not in names:
        raise CheckpointError(
            f"{quoted(snapshot.repo)} is an adapter and no base model; bring it in with 'loratool pull {snapshot.repo}'"
        )
    chosen = choose_weights(names, snapshot.repo)
    if not chosen.endswith(INDEX_SUFFIX):
        return HubWeights(None, {chosen: snapshot.files[chosen]})
    shards = set(read_index(fetch(snapshot, [chosen], command) / chosen).values())
    missing = sorted(shards - set(names))
    if missing and not snapshot.is_from_cache:
        raise CheckpointError(
            f"{quoted(chosen)} of {quoted(snapshot.repo)} names {quoted(missing[0])}, which is not there"
        )
    return HubWeights(chosen, {name: snapshot.files.get(name, HubFile(name)) for name in sorted(shards)})


def open_headers(snapshot: Snapshot, weights: HubWeights, cache: HeaderCache, command: str) -> Checkpoint:
    """A model of which nothing but its headers, its index and its configuration is downloaded: enough for a plan.

    Its path is that of the snapshot in huggingface_hub's cache, where the weights will be.

    Raises:
        CheckpointError: a header breaks a rule of the format, or contradicts the index.
        NotFoundError, HubError: the Hub cannot be asked, or does not say enough.
    """
    if not weights.are_known:
        raise HubError(f"the Hub does not say enough of the weights of {quoted(snapshot.repo)}; download them")
    small = [name for name in ("config.json", weights.index) if name is not None and name in snapshot.files]
    if small:
        fetch(snapshot, small, command)
    folder = cache_folder(snapshot.repo) / "snapshots" / snapshot.commit
    source = _Headers(snapshot, folder, cache, command)
    files = [weights.files[name] for name in sorted(weights.files)]
    headers = in_threads(source.read, files, HEADERS_AT_ONCE, leave=True)
    index = None if weights.index is None else folder / weights.index
    return Checkpoint.of_headers(folder, headers, index, {} if index is None else read_index(index))


def cached_headers(repo: str, commit: str, weights: HubWeights, cache: HeaderCache) -> Checkpoint | None:
    """What `open_headers` gave before, without asking anybody; None where a header is not here any more.

    Raises:
        CheckpointError: a header breaks a rule of the format.
    """
    folder = cache_folder(repo) / "snapshots" / commit
    headers = []
    for name, file in sorted(weights.files.items()):
        text = cache.get(file)
        if text is None:
            return None
        headers.append(parse_header(text, folder / name, file.size or 0))
    return Checkpoint.of_headers(folder, headers, None, {})


def download_base(snapshot: Snapshot, weights: HubWeights, command: str, watcher: Watcher | None = None, *,
                  recheck: bool = True) -> Path:  # fmt: skip
    """The folder of a model in huggingface_hub's cache, every file that it needs downloaded and checked.

    With `recheck` off, what is in the cache already is taken as it is.

    Raises:
        NotFoundError, HubError: a file cannot be downloaded, or is not what the Hub says it is.
    """
    wanted = dict.fromkeys([*weights.files, *model_files(snapshot.files)])
    expected = replace(snapshot, files={**snapshot.files, **weights.files})
    return fetch(expected, list(wanted), command, watcher, recheck=recheck)


def model_files(paths: Iterable[str]) -> list[str]:
    """The paths of the files that a model folder needs beside its weights."""
    return [
        path for path in sorted(paths) if is_safe(path) and any(fnmatch.fnmatch(path, each) for each in MODEL_FILES)
    ]


def is_downloaded(snapshot: Snapshot, weights: HubWeights) -> bool:
    """Whether all the weights are in huggingface_hub's cache."""
    return is_cached(snapshot, weights.files)


def recorded_weights(files: Mapping[str, Any]) -> HubWeights:
    """The weights as a catalogue keeps them (`HubWeights.to_json`).

    Raises:
        CheckpointError: the catalogue's entry is none of loratool's.
    """
    found = {}
    for name, facts in files.items():
        size, sha256, blob_id = (facts.get(key) for key in ("size", "sha256", "blob_id"))
        is_sound = is_safe(name) and "/" not in name and type(size) is int
        if not is_sound or not (SHA256.fullmatch(str(sha256)) or COMMIT.fullmatch(str(blob_id))):
            raise CheckpointError(
                f"the catalogue's entry for {quoted(name)} is damaged; remove the base and add it again"
            )
        found[name] = HubFile(name, size, sha256, None if sha256 else blob_id)
    return HubWeights(None, found)


class _Headers:
    """The headers of a snapshot's files: from the files where they are in the cache, else remembered, else asked for."""

    def __init__(self, snapshot: Snapshot, folder: Path, cache: HeaderCache, command: str) -> None:
        self.snapshot, self.folder, self.cache, self.command = snapshot, folder, cache, command

    def read(self, file: HubFile) -> Header:
        path = self.folder / file.path
        if path.is_file() and path.stat().st_size == file.size:
            return read_header(path)
        known = self.cache.get(file)
        text = self._ask(file) if known is None else known
        header = parse_header(text, path, file.size or 0)
        if known is None:
            self.cache.put(file, text)
        return header

    @cached_property
    def _files(self) -> HfFileSystem:
        from huggingface_hub import HfFileSystem

        return HfFileSystem(skip_instance_cache=True)

    def _ask(self, file: HubFile) -> bytes:
        """The JSON text of a header, by range."""
        repo, commit = self.snapshot.repo, self.snapshot.commit
        if self.snapshot.is_from_cache:
            raise NotFoundError(
                f"the header of {quoted(file.path)} is not here; run '{self.command}' once with the network"
            )
        with (
            hub_errors(self.command, repo, commit),
            self._files.open(f"{repo}/{file.path}", "rb", revision=commit, block_size=FIRST_BYTES) as stream,
        ):
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, (file.size or 0) - 8):
                raise CheckpointError(
                    f"{quoted(file.path)} of {quoted(repo)} is not a valid safetensors file: its header claims {length} "
                    f"bytes and the file has {file.size}"
                )
            return bytes(stream.read(length))
