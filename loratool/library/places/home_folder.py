"""Files in the home folder beside the catalogue: cached digests of tensors, and notes on the outputs of runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from loratool.checkpoint.fingerprint import DigestCache
from loratool.checkpoint.model import Checkpoint
from registry import home

RUNNING: Final = "running"
"""Folder in the home folder for notes on the outputs of runs (`loratool.checkpoint.unfinished`)."""


def digest_cache() -> DigestCache:
    """Return the cache of tensors' digests in the home folder."""
    return DigestCache(home() / "digests")


def remember(checkpoint: Checkpoint, digests: Mapping[str, str]) -> None:
    """Cache the digests of a base's tensors, if its files have not changed since they were opened."""
    cache = digest_cache()
    for header in checkpoint.headers:
        cache.put(header, {name: digests[name] for name in header.tensors})
