"""The files of an adapter's entry in the store, and notes on the adapter.

The entry of an adapter that loratool computes has the weights, and the configuration and facts as JSON. The files of any other
adapter are stored unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from loratool.formats.adapter_files import content_of_file
from loratool.formats.adapter_folder import tokenizer_files
from loratool.formats.adapter_names import CONFIG_NAME, FACTS_NAME, WEIGHTS_NAME
from loratool.formats.identity import AnyAdapter, Identity
from loratool.formats.kept_files import Content, kept_files, weights_name
from loratool.library.checking.no_change import no_change_notes


def entry_files(adapter: AnyAdapter) -> tuple[dict[str, Content], str]:
    """Return the files of an adapter's entry by name, and the name of the weights.

    Raises:
        AdapterError: JSON beside it is damaged.
    """
    if isinstance(adapter, Identity):
        return kept_files(adapter), weights_name(adapter)
    files: dict[str, Content] = {
        WEIGHTS_NAME: content_of_file(adapter.file),
        CONFIG_NAME: _json_bytes(adapter.config),
    }
    if adapter.facts:
        files[FACTS_NAME] = _json_bytes(adapter.facts)
    return files | tokenizer_files(adapter), WEIGHTS_NAME


def entry_notes(adapter: AnyAdapter) -> tuple[str, ...]:
    """Return notes on a catalogued adapter for the user."""
    if isinstance(adapter, Identity):
        return (*adapter.notes, f"it is catalogued but not computed: {adapter.why_not}")
    return (*adapter.notes, *no_change_notes(adapter))


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()
