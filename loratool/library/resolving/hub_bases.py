"""Bases from the Hub: catalogued by their headers; downloaded, checked and fingerprinted when their weights are needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from loratool.checkpoint.fingerprint import fingerprint, tensor_digests
from loratool.checkpoint.model import Checkpoint
from loratool.errors import CheckpointError, HubError, NotFoundError, VerificationError, quoted
from loratool.hub.address import HubAddress
from loratool.hub.bases import (
    HeaderCache,
    HubWeights,
    cached_headers,
    download_base,
    find_weights,
    is_downloaded,
    open_headers,
    recorded_weights,
)
from loratool.hub.repository import Snapshot, look, remember
from loratool.library.places.home_folder import digest_cache
from loratool.library.places.user_path import exists
from loratool.library.reporting.progress import Progress, Silent
from registry import BaseRecord, Registry, RegistryUnwritableError, home


@dataclass(frozen=True, slots=True)
class HubBase:
    """A base model on the Hub at one commit, with its weight files."""

    snapshot: Snapshot
    weights: HubWeights
    revision: str | None
    command: str

    @classmethod
    def find(cls, address: HubAddress, command: str) -> HubBase:
        """Ask the Hub (offline: the cache) for the base at an address. `command` is the user's command, for messages.

        Raises:
            NotFoundError, HubError, CheckpointError: it does not exist, cannot be accessed, or has no safetensors weights.
        """
        snapshot = look(address, command)
        return cls(snapshot, find_weights(snapshot, command), address.revision, command)

    @property
    def is_here(self) -> bool:
        """Whether its weights are in huggingface_hub's cache, or nothing else can be reached now."""
        return self.snapshot.is_from_cache or is_downloaded(self.snapshot, self.weights)

    @property
    def can_wait(self) -> bool:
        """Whether the Hub's facts suffice to catalogue it before it is downloaded."""
        return self.weights.are_known

    def headers(self) -> Checkpoint:
        """Return its headers, without its weights; see `hub.bases.open_headers`."""
        return open_headers(self.snapshot, self.weights, header_cache(), self.command)

    def download(self, watcher: Progress, *, recheck: bool = True) -> Path:
        """Download it, and return its folder in huggingface_hub's cache; see `hub.bases.download_base`."""
        path = download_base(self.snapshot, self.weights, self.command, watcher, recheck=recheck)
        remember(self.snapshot, self.revision)
        return path


def find_hub_base(address: HubAddress, command: str) -> HubBase:
    """Find the base at an address. An error also mentions that there is no such folder, in case one was meant.

    Raises:
        NotFoundError, HubError, CheckpointError: as `HubBase.find`.
    """
    try:
        return HubBase.find(address, command)
    except NotFoundError as error:
        raise NotFoundError(f"there is no folder {quoted(address)}, and as a Hub id: {error}") from None


def is_away(record: BaseRecord) -> bool:
    """Return whether a catalogued base has recorded files on the Hub that are not on this disk."""
    return bool(record.files) and record.revision is not None and (record.path is None or not exists(record.path))


def hub_base(record: BaseRecord) -> HubBase:
    """Find a catalogued base on the Hub, with the weight files that were recorded when it was catalogued.

    Raises:
        NotFoundError, HubError, CheckpointError: it no longer exists, has changed, or cannot be accessed.
    """
    command = f"loratool base add {record.name} {record.source} --download"
    found = HubBase.find(HubAddress.parse(record.source).at(record.revision), command)
    recorded = recorded_weights(record.files or {})
    for name, file in found.weights.files.items():
        known = recorded.files.get(name)
        said = (file.sha256, file.blob_id) if file.is_known else None
        if known is None or (said is not None and said != (known.sha256, known.blob_id)):
            raise HubError(
                f"the Hub's record of {quoted(name)} of {quoted(record.source)} has changed since base {quoted(record.name)} was "
                f"catalogued; do not use it, or remove the base with 'loratool base remove {record.name}' and add it again"
            )
    return replace(found, weights=replace(found.weights, files=recorded.files))


def obtain(record: BaseRecord, catalogue: Registry, progress: Progress | None = None) -> BaseRecord:
    """Download a catalogued base, check and fingerprint it, record its path, and return its new entry.

    Raises:
        LoratoolError, registry.RegistryError: it cannot be downloaded, or differs from what was catalogued.
    """
    watcher = progress or Silent()
    path = hub_base(record).download(watcher)
    checkpoint = Checkpoint.open(path)
    watcher.begin("fingerprinting", checkpoint.nbytes)
    found = fingerprint(checkpoint.tensors, tensor_digests(checkpoint, digest_cache(), progress=watcher.advance))
    if record.fingerprint not in (None, found):
        raise VerificationError(
            f"base {quoted(record.name)} was downloaded again and is another model now: expected "
            f"{str(record.fingerprint)[:12]}…, found {found[:12]}…; catalogue it under another name"
        )
    try:
        with catalogue.for_writing() as writable:
            return writable.bases.update(record.name, path=path, fingerprint=found)
    except RegistryUnwritableError:
        return replace(record, path=path, fingerprint=found)


def known_headers(record: BaseRecord) -> Checkpoint | None:
    """Return the cached headers of a base that is not downloaded; None if they are no longer in the cache."""
    try:
        weights = recorded_weights(record.files or {})
        return cached_headers(record.source, str(record.revision), weights, header_cache())
    except CheckpointError:
        return None


def header_cache() -> HeaderCache:
    """Return the cache in the home folder for headers of bases that are not downloaded."""
    return HeaderCache(home() / "headers")
