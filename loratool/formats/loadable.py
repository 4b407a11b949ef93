"""PEFT configurations that other programs wrote, as PEFT loads them: defaults for null, whole numbers for ``4.0``.

What is read so is also written so: an adapter that is exported loads in PEFT, whatever its own configuration looked like.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from loratool.errors import AdapterError, quoted

NEVER_NULL: Final[Mapping[str, tuple[type, ...]]] = {
    "bias": (str,), "rank_pattern": (dict,), "alpha_pattern": (dict,), "lora_dropout": (int, float),
}  # fmt: skip
"""Keys of which PEFT 0.21 loads no null or other empty value, with the types that it wants; without them it takes defaults."""

WHOLE: Final = ("r", "init_r", "target_r", "layers_to_transform", "rank_pattern")
FLAGS: Final = ("use_rslora", "fan_in_fan_out", "use_dora", "use_qalora", "lora_bias")
"""Keys that are true or false and change numbers. PEFT takes any text for true, also ``"false"``."""


def loadable(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return a configuration as PEFT loads it; what it loads already stays as it is. `source` is for messages.

    Raises:
        AdapterError: a text stands where true or false is meant.
    """
    for key in FLAGS:
        if isinstance(config.get(key), str) and config[key]:
            raise AdapterError(
                f"{quoted(key)} in {quoted(source)} is the text {quoted(config[key], 40)}, which PEFT takes for true whatever it "
                "says; write true or false, without quotes"
            )
    kept = {key: value for key, value in config.items() if value or isinstance(value, NEVER_NULL.get(key, (object,)))}
    kept = {key: value for key, value in kept.items() if value != "" or key not in NEVER_NULL}
    return kept | {key: whole(kept[key]) for key in WHOLE if key in kept}


def whole(value: object) -> object:
    """``4`` for ``4.0``, as programs without whole numbers write it, also in lists and objects; all else as it is."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [whole(each) for each in value]
    return {key: whole(each) for key, each in value.items()} if isinstance(value, dict) else value
