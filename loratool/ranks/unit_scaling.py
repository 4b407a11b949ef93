"""A PEFT LoRA configuration under which nothing is scaled: alpha is the rank, for every module."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Final

FROM_PARENT: Final = ("task_type", "base_model_name_or_path", "revision", "fan_in_fan_out", "auto_mapping")
"""Keys that say what an adapter belongs to and not how it acts."""

TARGETING: Final = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Keys that say which modules an adapter is for."""


def unit_config(
    ranks: Mapping[str, int], targeting: Mapping[str, Any], parent: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The configuration of an adapter with these `ranks` by module, whose scaling is 1 everywhere.

    `targeting` are its TARGETING keys; what it belongs to is taken from the configuration of a `parent`.
    """
    largest = max(ranks.values())
    others = {f"^{re.escape(module)}": rank for module, rank in sorted(ranks.items()) if rank != largest}
    belongs = {key: parent[key] for key in FROM_PARENT if key in parent} if parent else {}
    return belongs | {
        "peft_type": "LORA",
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "bias": "none",
        "inference_mode": True,
        **targeting,
    }


def common_targeting(configs: Collection[Mapping[str, Any]], modules: Collection[str]) -> dict[str, Any]:
    """The TARGETING keys on which all `configs` agree, else the full names of `modules`."""
    kept = [{key: config[key] for key in TARGETING if config.get(key) is not None} for config in configs]
    first = kept[0]
    agree = "target_modules" in first and all(_same(other, first) for other in kept)
    return first if agree else {"target_modules": sorted(modules)}


def _same(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether two targetings choose alike; the order of names in a list says nothing."""
    return left.keys() == right.keys() and all(_unordered(left[key]) == _unordered(right[key]) for key in left)


def _unordered(value: object) -> object:
    return sorted(map(str, value)) if isinstance(value, list) else value
