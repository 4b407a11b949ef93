"""Modules that a PEFT adapter contains whole, which replace the base's own: ``modules_to_save`` and embeddings.

PEFT 0.21 (``peft.utils.other._set_trainable``) keeps a module whole if its name ends with a listed name, and saves its tensors
under their own names after the usual prefix. It also saves embeddings and heads like this if the vocabulary was grown
(``save_embedding_layers``), and restores them on loading. In that case it may also save its own inner copies.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from loratool.architecture import Role, any_model
from loratool.checkpoint.fingerprint import hash_tensor
from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.tensor_keys import PREFIX, split_peft
from loratool.updates.replacement import Replacement

HALVES: Final = {"weight": "bias", "bias": "weight"}

CLASSIFIERS: Final = frozenset({"classifier", "score"})
"""Modules that PEFT always lists for classifiers (``PeftModelForSequenceClassification``), even if they do not exist."""


INNER: Final = ("modules_to_save", "original_module")
"""Name components under which PEFT keeps the trained module and the base's own inside a model."""


def split_replacements(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], source: str
) -> tuple[dict[str, TensorInfo], dict[str, Replacement]]:
    """Return the tensors of factors by key, and the replacements of whole tensors by the base's names.

    Raises:
        AdapterError: ``modules_to_save`` is not a list of names, or no listed module has tensors although PEFT does not list
          it by default.
    """
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise AdapterError(f"'modules_to_save' in {quoted(source)} is {quoted(saved, 40)} and must be a list of names")
    tensors = _without_inner_copies(tensors, source)
    found = {key.removeprefix(PREFIX): info for key, info in tensors.items() if _is_whole(key, tuple(saved))}
    is_inner = any(f".{word}." in key for key in tensors for word in INNER)  # refused by that name, later
    if saved and not (found or is_inner) and set(saved) != CLASSIFIERS:
        raise AdapterError(
            f"{quoted(source)} lists modules_to_save ({quoted(saved[0])}, ...) but holds none of their tensors; "
            "the file is incomplete"
        )
    found |= {key.removeprefix(PREFIX): info for key, info in tensors.items() if _is_embedding(key)}
    rest = {key: info for key, info in tensors.items() if key.removeprefix(PREFIX) not in found}
    return rest, {name: Replacement(info) for name, info in sorted(found.items())}


def refuse_incomplete(adapter: Adapter, landed: Mapping[str, str], base: Collection[str]) -> None:
    """Raise AdapterError if an adapter contains only part of a module that it must contain whole.

    Args:
        adapter: as it was read.
        landed: the tensor of the base that each parameter of the adapter lands on.
        base: the names of the base's tensors.
    """
    held = adapter.replacements
    lost = tuple(each for each in adapter.whole if not any(_is_whole(name, (each,)) for name in held))
    missing = next((name for name in base if _is_whole(name, lost)), None) if lost else None
    if missing is not None:
        raise AdapterError(
            f"{quoted(adapter.name)} lists modules_to_save of which it holds no tensors, and the base has "
            f"{quoted(missing)}; the file is incomplete"
        )
    places = {landed[name] for name in held}
    for name in places:
        module, _, leaf = name.rpartition(".")
        other = f"{module}.{HALVES.get(leaf)}"
        if other in base and other not in places:
            raise AdapterError(
                f"{quoted(adapter.name)} replaces {quoted(name)} and holds no {quoted(other)}; the file is incomplete"
            )


def _is_whole(key: str, saved: tuple[str, ...]) -> bool:
    """Return whether a tensor belongs to a whole module, or to a module inside one."""
    parts = key.removeprefix(PREFIX).split(".")
    modules = (".".join(parts[:count]) for count in range(1, len(parts)))
    own = not any(part in INNER or part.startswith("lora_") for part in parts)
    return own and any(module.endswith(saved) for module in modules)


def _is_embedding(key: str) -> bool:
    """Return whether a tensor is the whole weight of a token embedding or an output head."""
    name = key.removeprefix(PREFIX)
    is_plain = name != key and name.endswith(".weight") and split_peft(key) is None
    return is_plain and any_model().role(name) in (Role.TOKENS, Role.HEAD)


def _without_inner_copies(tensors: Mapping[str, TensorInfo], source: str) -> dict[str, TensorInfo]:
    """Drop the duplicates that PEFT saves under inner names (``lm_head.modules_to_save.weight``) and never loads.

    Raises:
        AdapterError: a duplicate differs from the original.
    """
    kept = {}
    for key, info in tensors.items():
        inner = next((word for word in INNER if f".{word}." in key), None)
        plain = tensors.get(key.replace(f".{inner}.", "."))
        if inner is None or plain is None:
            kept[key] = info
        elif inner == "modules_to_save" and hash_tensor(info) != hash_tensor(plain):
            raise AdapterError(
                f"{quoted(source)} holds two versions of {quoted(plain.name)}, the other as {quoted(key)}; save it again"
            )
    return kept
