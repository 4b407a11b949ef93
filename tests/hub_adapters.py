"""Adapters and models put into the stand-in of the Hub, past its API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hub_stand_in import HubStandIn, Repository


def files_of(folder: Path, inside: str = "") -> dict[str, bytes]:
    """The content of every file in a folder, by its path in a repository."""
    prefix = f"{inside}/" if inside else ""
    return {
        prefix + path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def publish(
    hub: HubStandIn,
    repo: str,
    folder: Path,
    *,
    inside: str = "",
    base_model: str | None = None,
    facts: Mapping[str, Any] | None = None,
    others: Mapping[str, bytes] | None = None,
) -> Repository:
    """Commit a folder to a repository, made if need be; an adapter's with another base or loratool's facts."""
    repository = hub.repositories.get(repo) or hub.create(repo)
    files = files_of(folder, inside)
    prefix = f"{inside}/" if inside else ""
    if base_model is not None:
        config = json.loads(files[f"{prefix}adapter_config.json"])
        files[f"{prefix}adapter_config.json"] = json.dumps(config | {"base_model_name_or_path": base_model}).encode()
    if facts is not None:
        files[f"{prefix}loratool.json"] = json.dumps(facts).encode()
    repository.put(files | dict(others or {}))
    return repository
