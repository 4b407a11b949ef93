"""File names of adapters, and which of a folder's files belong to one."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final

from loratool.checkpoint.model import INDEX_SUFFIX

CONFIG_NAME: Final = "adapter_config.json"
WEIGHTS_NAME: Final = "adapter_model.safetensors"
INDEX_NAME: Final = "adapter_model" + INDEX_SUFFIX
FACTS_NAME: Final = "loratool.json"
CONFIG_KEY: Final = "adapter_config"
FACTS_KEY: Final = "loratool"
"""Metadata keys of the configuration and of loratool's facts in a single file."""

SINGLE_FILE_SUFFIXES: Final = frozenset({".safetensors", ".st"})
WEIGHT_SUFFIXES: Final = SINGLE_FILE_SUFFIXES | {".gguf"}
NAMES_IN_FOLDERS: Final = (
    WEIGHTS_NAME,
    INDEX_NAME,
    "adapters.safetensors",
    "adapter.safetensors",
    "pytorch_lora_weights.safetensors",
)
"""Names of the weights in folders, by program: PEFT, PEFT in shards, mlx-lm, adapters, diffusers."""

BESIDE: Final = (CONFIG_NAME, FACTS_NAME, "head_config.json")
"""JSON files beside the weights that belong to the adapter."""

MODEL_CONFIG: Final = "config.json"
_SHARD: Final = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.safetensors")


def choose_weights(names: Collection[str]) -> str | None:
    """Return the file of a folder that has the adapter's weights, or their index; None if there is none or several may be."""
    for name in NAMES_IN_FOLDERS:
        if name in names:
            return name
    singles = single_files(names)
    return singles[0] if len(singles) == 1 and CONFIG_NAME not in names and MODEL_CONFIG not in names else None


def single_files(names: Iterable[str]) -> list[str]:
    """Return the files of a folder that may each be an adapter, in natural order."""
    return natural(name for name in names if Path(name).suffix in WEIGHT_SUFFIXES and not _SHARD.fullmatch(name))


def shards_in(names: Iterable[str]) -> list[str]:
    """Return the files of a folder that have a shard's name, in order."""
    return natural(name for name in names if _SHARD.fullmatch(name))


def index_of_shard(name: str) -> str | None:
    """Return the name of the index that lists a shard; None if the name is not a shard's."""
    match = _SHARD.fullmatch(name)
    return f"{match['stem']}{INDEX_SUFFIX}" if match else None


def natural(names: Iterable[str]) -> list[str]:
    """Sort names in natural order: ``checkpoint-500`` before ``checkpoint-2390``."""
    return sorted(names, key=lambda name: [(part.isdecimal(), int(part[:18]) if part.isdecimal() else 0, part)
                                           for part in re.split(r"([0-9]+)", name)])  # fmt: skip
