"""The seeds of a merge: derived from its adapters, so that equal merges round alike."""

from __future__ import annotations

import json
from collections.abc import Sequence

from blake3 import blake3


def seed_of_adapters(adapters: Sequence[tuple[str, float]]) -> str:
    """Return 64 hexadecimal digits derived from adapters in order, each given as its sha256 and its weight."""
    content = [[sha256, float(weight).hex()] for sha256, weight in adapters]
    return str(blake3(json.dumps(content).encode()).hexdigest())


def seed_of(seed: str, name: str) -> int:
    """Return the seed, below 2**64, of the parameter `name` in a merge with this seed."""
    return int.from_bytes(blake3(f"{seed} {name}".encode()).digest(8), "little")
