"""What the registry's tests put into a catalogue."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from registry import AdapterFacts

SERVER = (
    os.environ.get("LORATOOL_TEST_DATABASE", "").replace("{worker}", os.environ.get("PYTEST_XDIST_WORKER", "main"))
    or None
)
"""URL of an empty database on a server, to run on it what else runs on a SQLite file: its tables are dropped.

`{worker}` in it stands for pytest-xdist's name of the process, `main` where there is one only: each needs its own database.
"""


def digest(text: str) -> str:
    """A sha256 in hex that stands for `text`."""
    return hashlib.sha256(text.encode()).hexdigest()


def facts(weights: str = "weights", **changes: Any) -> AdapterFacts:
    """A LoRA of rank 8 whose weights file has the digest of `weights`."""
    known: dict[str, Any] = {
        "kind": "lora",
        "sha256": digest(weights),
        "size_bytes": 4096,
        "rank": 8,
        "ranks": {"model.layers.0.self_attn.q_proj": 8},
        "alpha": 16.0,
        "scaling": 2.0,
        "target_modules": ["q_proj", "v_proj"],
        "dtype": "float32",
        "parameter_count": 1024,
    }
    return AdapterFacts(**{**known, **changes})


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root may write anywhere: permissions mean something only to somebody else."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
