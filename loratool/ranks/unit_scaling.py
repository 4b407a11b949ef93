"""A PEFT LoRA configuration with a scaling of 1: in every module, alpha is the rank."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Final

FROM_PARENT: Final = ("task_type", "base_model_name_or_path", "revision", "fan_in_fan_out", "auto_mapping")
"""Keys that describe an adapter's base model and task."""

TARGETING: Final = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Keys that select the modules an adapter changes."""


def unit_config(
    ranks: Mapping[str, int], targeting: Mapping[str, Any], parent: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the configuration of an adapter with these `ranks` by module and a scaling of 1 everywhere.

    `targeting` holds its TARGETING keys. The FROM_PARENT keys are copied from the configuration `parent`.
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
    """Return the TARGETING keys if all `configs` agree on them, else the full names of `modules`."""
    kept = [{key: config[key] for key in TARGETING if config.get(key) is not None} for config in configs]
    first = kept[0]
    agree = "target_modules" in first and all(_same(other, first) for other in kept)
    return first if agree else {"target_modules": sorted(modules)}


def _same(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether two sets of TARGETING keys are equal, whatever the order of names in a list."""
    return left.keys() == right.keys() and all(_unordered(left[key]) == _unordered(right[key]) for key in left)


def _unordered(value: object) -> object:
    return sorted(map(str, value)) if isinstance(value, list) else value
