"""What the home folder holds beside the catalogue: digests of tensors that were read, and notes of what runs are writing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from loratool.checkpoint.fingerprint import DigestCache, file_identity
from loratool.checkpoint.model import Checkpoint
from registry import home

RUNNING: Final = "running"
"""Folder, in the home folder, of notes of what runs are writing (`loratool.checkpoint.unfinished`)."""


def digest_cache() -> DigestCache:
    """The cache of tensors' digests, in the home folder."""
    return DigestCache(home() / "digests")


@contextmanager
def remembered(checkpoint: Checkpoint, *, unless: bool) -> Iterator[Callable[[Mapping[str, str]], None]]:
    """Give a function that caches the base's digests under what its files were before they were read."""
    cache = digest_cache()
    before = [] if unless else [(header, file_identity(header.file)) for header in checkpoint.headers]

    def remember(digests: Mapping[str, str]) -> None:
        for header, identity in before:
            cache.put(header, {name: digests[name] for name in header.tensors}, identity)

    yield remember
