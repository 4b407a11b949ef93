"""An adapter's entry for ``--json``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from registry import AdapterSummary


def adapter_json(record: AdapterSummary) -> dict[str, Any]:
    """Return an adapter's entry for ``--json``, with the catalogue's columns as keys."""
    value = {key: item for key, item in asdict(record).items() if key not in {"id", "locations"}}
    value["created_at"] = record.created_at.isoformat()
    value["tags"] = list(record.tags)
    value["version"] = record.version or None
    return value
