"""What the home folder holds beside the catalogue: digests of tensors that were read, and notes of what runs are writing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from loratool.checkpoint.fingerprint import DigestCache
from loratool.checkpoint.model import Checkpoint
from registry import home

RUNNING: Final = "running"
"""Folder, in the home folder, of notes of what runs are writing (`loratool.checkpoint.unfinished`)."""


def digest_cache() -> DigestCache:
    """The cache of tensors' digests, in the home folder."""
    return DigestCache(home() / "digests")


def remember(checkpoint: Checkpoint, digests: Mapping[str, str]) -> None:
    """Cache the digests of a base's tensors, whose files are as they were when they were opened."""
    cache = digest_cache()
    for header in checkpoint.headers:
        cache.put(header, {name: digests[name] for name in header.tensors})
