"""``modules_to_save``: modules that a PEFT adapter holds whole, to stand in the place of the base's own.

PEFT 0.21 (``peft.utils.other._set_trainable``) keeps a module so if its name ends with one of those listed, and saves its
tensors under their own names behind the prefix of all keys.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, quoted
from loratool.formats.tensor_keys import PREFIX

CLASSIFIERS: Final = frozenset({"classifier", "score"})
"""What PEFT lists by itself for a model that classifies (``PeftModelForSequenceClassification``), whether it has them or not."""


def split_replacements(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], source: str
) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
    """The tensors of factors, by their keys; and those of whole modules, by the names that the base gives them.

    Raises:
        AdapterError: ``modules_to_save`` is no list of names, or none of what it lists is there, and it is not what PEFT
            lists by itself.
    """
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise AdapterError(f"'modules_to_save' in {quoted(source)} is {quoted(saved, 40)} and must be a list of names")
    found = {key.removeprefix(PREFIX): info for key, info in tensors.items() if _is_whole(key, tuple(saved))}
    if saved and not found and set(saved) != CLASSIFIERS:
        raise AdapterError(
            f"{quoted(source)} lists modules_to_save ({quoted(saved[0])}, ...) and holds none of their tensors; "
            "the file is incomplete"
        )
    rest = {key: info for key, info in tensors.items() if key.removeprefix(PREFIX) not in found}
    return rest, dict(sorted(found.items()))


def lacking(config: Mapping[str, Any], held: Collection[str], names: Collection[str]) -> list[str]:
    """Of the tensors `names` of a base those in modules that ``modules_to_save`` lists and no tensor `held` is of."""
    saved = config.get("modules_to_save") or ()
    lost = tuple(each for each in saved if not any(_is_whole(name, (each,)) for name in held))
    return [name for name in names if _is_whole(name, lost)]


def _is_whole(key: str, saved: tuple[str, ...]) -> bool:
    """Whether a tensor belongs to a module that is kept whole, or to a module inside it."""
    parts = key.removeprefix(PREFIX).split(".")
    modules = (".".join(parts[:count]) for count in range(1, len(parts)))
    return ".lora_" not in key and any(module.endswith(saved) for module in modules)
