"""Base models on the Hub. Headers are read by range requests; weights are downloaded when they are needed."""

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
from loratool.checkpoint.json_text import read_limited
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
"""The files a model folder needs beside its weights. Pickles and other frameworks' weights are not downloaded."""

HEADERS_AT_ONCE: Final = 8
FIRST_BYTES: Final = 1 << 17
"""Bytes of a file in the first request; most headers are shorter."""


def fetch_config(address: HubAddress, command: str) -> Path:
    """Download only the ``config.json`` of a model repository, and return its path.

    Raises:
        NotFoundError, HubError: there is none, or it cannot be downloaded.
    """
    return fetch(look(address, command), ["config.json"], command) / "config.json"


class HeaderCache:
    """A cache in `folder` for headers of safetensors files on the Hub, keyed by the sha256 of the file.

    Failures to read or write it are ignored: the header is then requested again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, file: HubFile) -> bytes | None:
        """Return the JSON text of a file's header, or None."""
        try:
            return read_limited(self._entry(file), MAX_HEADER_BYTES)
        except (OSError, CheckpointError):
            return None

    def put(self, file: HubFile, text: bytes) -> None:
        """Store the JSON text of a file's header."""
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
    """The files with the weights of a base, by name, and the name of their index, if any."""

    index: str | None
    files: Mapping[str, HubFile]

    @property
    def are_known(self) -> bool:
        """Whether the Hub gives the size and hash of every file, so that a download can be checked."""
        return all(file.is_known for file in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """The entry in the catalogue: for each file its size in bytes, and its sha256 or git blob id."""
        return {
            name: {"size": file.size, **({"sha256": file.sha256} if file.sha256 else {"blob_id": file.blob_id})}
            for name, file in sorted(self.files.items())
        }


def find_weights(snapshot: Snapshot, command: str) -> HubWeights:
    """Find the weight files of a snapshot. The index, if any, is downloaded.

    Raises:
        CheckpointError: the snapshot has no safetensors weights, or more than one model.
        HubError: the index cannot be downloaded.
    """
    names = snapshot.names_in("")
    if "adapter_config.json" in names and "config.json" not in names:
        raise CheckpointError(
            f"{quoted(snapshot.repo)} is an adapter, not a base model; get it with 'loratool pull {snapshot.repo}'"
        )
    chosen = choose_weights(names, snapshot.repo)
    if not chosen.endswith(INDEX_SUFFIX):
        return HubWeights(None, {chosen: snapshot.files[chosen]})
    shards = set(read_index(fetch(snapshot, [chosen], command) / chosen).values())
    missing = sorted(shards - set(names))
    if missing and not snapshot.is_from_cache:
        raise CheckpointError(
            f"{quoted(chosen)} of {quoted(snapshot.repo)} names {quoted(missing[0])}, which is not in the repository"
        )
    return HubWeights(chosen, {name: snapshot.files.get(name, HubFile(name)) for name in sorted(shards)})


def open_headers(snapshot: Snapshot, weights: HubWeights, cache: HeaderCache, command: str) -> Checkpoint:
    """Open a model of which only headers, index and configuration are downloaded. That is enough for a plan.

    Its path is the snapshot's folder in huggingface_hub's cache, where a download will put the weights.

    Raises:
        CheckpointError: a header is invalid or contradicts the index.
        NotFoundError, HubError: a request failed, or the Hub does not give the files' sizes and hashes.
    """
    if not weights.are_known:
        raise HubError(f"the Hub gives no size or hash for the weights of {quoted(snapshot.repo)}; download them")
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
    """Open the same model as `open_headers`, without network; None if a header is no longer in the cache.

    Raises:
        CheckpointError: a header is invalid.
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
    """Download and check every file that a model needs; return its folder in huggingface_hub's cache.

    Without `recheck`, files that are already in the cache are not checked again.

    Raises:
        NotFoundError, HubError: a file cannot be downloaded, or differs from what the Hub lists.
    """
    wanted = dict.fromkeys([*weights.files, *model_files(snapshot.files)])
    expected = replace(snapshot, files={**snapshot.files, **weights.files})
    return fetch(expected, list(wanted), command, watcher, recheck=recheck)


def model_files(paths: Iterable[str]) -> list[str]:
    """Return those `paths` that a model folder needs beside its weights, sorted."""
    return [
        path for path in sorted(paths) if is_safe(path) and any(fnmatch.fnmatch(path, each) for each in MODEL_FILES)
    ]


def is_downloaded(snapshot: Snapshot, weights: HubWeights) -> bool:
    """Whether all weights are in huggingface_hub's cache."""
    return is_cached(snapshot, weights.files)


def recorded_weights(files: Mapping[str, Any]) -> HubWeights:
    """Read the catalogue's entry that `HubWeights.to_json` wrote.

    Raises:
        CheckpointError: the entry is invalid.
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
    """A reader of the headers of a snapshot's files: from the downloaded file, else the header cache, else the Hub."""

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
        """Request the JSON text of a header by range."""
        repo, commit = self.snapshot.repo, self.snapshot.commit
        if self.snapshot.is_from_cache:
            raise NotFoundError(
                f"the header of {quoted(file.path)} is not in the cache; run '{self.command}' once while online"
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
                    f"bytes, but the file has {file.size}"
                )
            return bytes(stream.read(length))
