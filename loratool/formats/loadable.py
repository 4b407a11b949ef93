"""Normalize PEFT configurations from other programs to what PEFT loads: defaults for null, integers for ``4.0``.

The normalized configuration is also what gets written, so that an exported adapter always loads in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from loratool.errors import AdapterError, quoted

NEVER_NULL: Final[Mapping[str, tuple[type, ...]]] = {
    "bias": (str,), "rank_pattern": (dict,), "alpha_pattern": (dict,), "lora_dropout": (int, float),
}  # fmt: skip
"""Keys for which PEFT 0.21 rejects null and other empty values, with their types; if they are missing, it uses defaults."""

WHOLE: Final = ("r", "init_r", "target_r", "layers_to_transform", "rank_pattern")
FLAGS: Final = ("use_rslora", "fan_in_fan_out", "use_dora", "use_qalora", "lora_bias")
"""Boolean keys that affect numbers. PEFT treats any text as true, even ``"false"``."""


def loadable(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return a configuration that PEFT loads, keeping the values that already load. `source` is for messages.

    Raises:
        AdapterError: a text stands where true or false is meant.
    """
    for key in FLAGS:
        if isinstance(config.get(key), str) and config[key]:
            raise AdapterError(
                f"{quoted(key)} in {quoted(source)} is the text {quoted(config[key], 40)}, and PEFT treats any text as true; "
                "write true or false, without quotes"
            )
    kept = {key: value for key, value in config.items() if value or isinstance(value, NEVER_NULL.get(key, (object,)))}
    kept = {key: value for key, value in kept.items() if value != "" or key not in NEVER_NULL}
    return kept | {key: whole(kept[key]) for key in WHOLE if key in kept}


def whole(value: object) -> object:
    """Return ``4`` for ``4.0``, as written by programs without integers, also inside lists and objects; keep other values."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [whole(each) for each in value]
    return {key: whole(each) for key, each in value.items()} if isinstance(value, dict) else value
