"""Parameters that a PEFT adapter contains whole, which replace the base's own: ``modules_to_save``, embeddings, biases, norms.

PEFT 0.21 (``peft.utils.other._set_trainable``) keeps a module whole if its name ends with a listed name, and saves its tensors
under their own names after the usual prefix. It saves trained biases (``bias``) like this, and embeddings and heads if the
vocabulary was grown (``save_embedding_layers``). On loading, every tensor with the name of a parameter replaces that parameter.
It may also save inner names: ``X.base_layer.bias`` is the bias of an adapted module X, ``X.modules_to_save.weight`` is another
copy of ``X.weight``, and ``X.original_module.weight`` is the base's own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from loratool.architecture import Role, any_model, module_of
from loratool.checkpoint.fingerprint import hash_tensor
from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.tensor_keys import BASE_LAYER, PREFIX, TOKEN_ADAPTER, adapters_in, split_peft
from loratool.updates import RowsUpdate
from loratool.updates.replacement import Replacement

HALVES: Final = {"weight": "bias", "bias": "weight"}

CLASSIFIERS: Final = frozenset({"classifier", "score"})
"""Modules that PEFT always lists for classifiers (``PeftModelForSequenceClassification``), even if they do not exist."""

_SAVED: Final = "modules_to_save"
"""Name component under which PEFT keeps the trained module inside a model; the adapter's name may follow it."""

_ORIGINAL: Final = "original_module"
"""Name component under which PEFT keeps the base's own module beside the trained one."""


def split_replacements(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], source: str
) -> tuple[dict[str, TensorInfo], dict[str, Replacement]]:
    """Return the tensors of factors by key, and the replacements of whole tensors by the base's names.

    Raises:
        AdapterError: ``modules_to_save`` is not a list of names, no listed module has tensors although PEFT does not list
          it by default, or two copies of a parameter differ.
    """
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise AdapterError(f"'modules_to_save' in {quoted(source)} is {quoted(saved, 40)} and must be a list of names")
    adapters = adapters_in(tensors)
    found: dict[str, TensorInfo] = {}
    originals, rest = {}, {}
    for key, info in sorted(tensors.items(), key=lambda item: _is_inner(item[0])):  # a parameter's own name comes first
        name = _name_in_base(key, adapters)
        if name is None or not _is_kept(key, name, saved, config):
            rest[key] = info
        elif f".{_ORIGINAL}." in key:
            originals[key] = name
        elif name in found and hash_tensor(found[name]) != hash_tensor(info):
            raise AdapterError(
                f"{quoted(source)} holds two versions of {quoted(found[name].name)}, the other as {quoted(key)}; save it again"
            )
        else:
            found.setdefault(name, info)
    rest |= {key: tensors[key] for key, name in originals.items() if name not in found}
    if saved and not any(_is_whole(name, tuple(saved)) for name in found) and set(saved) != CLASSIFIERS:
        raise AdapterError(
            f"{quoted(source)} lists modules_to_save ({quoted(saved[0])}, ...) but holds none of their tensors; "
            "the file is incomplete"
        )
    return rest, {name: Replacement(info) for name, info in sorted(found.items())}


def split_own_base(adapter: Adapter, replaced: Mapping[str, Replacement]) -> dict[str, TensorInfo]:
    """Return the tensors of `replaced` that an adapter also updates: copies of the base's own, which PEFT saves beside them.

    Raises:
        AdapterError: the copy does not fit its update, or PEFT would ignore it because there is none.
    """
    found = {}
    for name, each in replaced.items():
        update, info = adapter.changes.get(name), each.tensor
        if update is None and f".{BASE_LAYER}.weight" in info.name:
            raise AdapterError(
                f"{quoted(adapter.name)} holds {quoted(info.name)} and no update of it, so PEFT would ignore it; the file is "
                "incomplete"
            )
        if update is None:
            continue
        fits = update.shape in (info.shape, info.shape[::-1])
        if not fits and not (isinstance(update, RowsUpdate) and update.shape[1:] == info.shape[1:]):
            raise AdapterError(
                f"{quoted(info.name)} in {quoted(adapter.name)} is {list(info.shape)} and its update fits {list(update.shape)}; "
                "was it saved from a sharded run without gathering?"
            )
        found[name] = info
    return found


def peft_name(name: str, adapter: Adapter) -> str:
    """Return the name under which PEFT loads a parameter that `adapter` contains whole."""
    module, _, leaf = name.rpartition(".")
    inner = f"{BASE_LAYER}." if module in adapter.modules else ""
    if isinstance(adapter.changes.get(name), RowsUpdate):
        inner = f"{TOKEN_ADAPTER}.{inner}"
    return f"{PREFIX}{module}.{inner}{leaf}"


def lost_biases(adapter: Adapter, landed: Mapping[str, Collection[str]], base: Collection[str]) -> list[str]:
    """Return a note if an adapter was trained with biases, and lacks those of modules that it changes.

    PEFT from 0.6 to 0.18 lost them with ``bias="lora_only"``, and loads such a file without them.
    """
    stated = adapter.config.get("bias")
    if stated in (None, "none"):
        return []
    places = {place for names in landed.values() for place in names}
    changed = (place for name, update in adapter.changes.items() if not update.replaces for place in landed[name])
    biases = (f"{module_of(place)}.bias" for place in changed)
    lost = sorted({bias for bias in biases if bias in base and bias not in places})
    if not lost:
        return []
    return [
        f"{quoted(adapter.name)} was trained with biases (bias={quoted(stated, 40)}) and holds no {quoted(lost[0])}"
        + (f" and {len(lost) - 1} more" if lost[1:] else "")
        + ": they stay the base's, as in PEFT"
    ]


def refuse_incomplete(adapter: Adapter, landed: Mapping[str, Collection[str]], base: Collection[str]) -> None:
    """Raise AdapterError if an adapter contains only part of a module that it must contain whole.

    Args:
        adapter: as it was read.
        landed: the tensors of the base that each parameter of the adapter lands on.
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
    places = {place for name in held for place in landed[name]}
    whole = (name for name in held if _is_whole(name, adapter.whole) or _is_embedding(name))
    for name in sorted({place for each in whole for place in landed[each]}):
        module, _, leaf = name.rpartition(".")
        other = f"{module}.{HALVES.get(leaf)}"
        if other in base and other not in places:
            raise AdapterError(
                f"{quoted(adapter.name)} replaces {quoted(name)} and holds no {quoted(other)}; the file is incomplete"
            )


def _name_in_base(key: str, adapters: Collection[str | None]) -> str | None:
    """Return the name of the base's parameter that a tensor is a copy of; None if it belongs to an update.

    `adapters` are the adapter's own names in the file, which follow ``modules_to_save``.
    """
    parts = key.removeprefix(PREFIX).split(".")
    name: list[str] = []
    for place, part in enumerate(parts):
        if part in (_SAVED, _ORIGINAL) or (
            part in (BASE_LAYER, TOKEN_ADAPTER)
            and len(parts) > place + 1
            and all(each in (BASE_LAYER, *HALVES) for each in parts[place + 1 :])
        ):
            continue
        if place and parts[place - 1] == _SAVED and place + 1 < len(parts) and part in adapters:
            continue
        name.append(part)
    found = ".".join(name)
    return found if split_peft(found) is None else None


def _is_inner(key: str) -> bool:
    return any(f".{word}." in key for word in (_SAVED, _ORIGINAL))


def _is_kept(key: str, name: str, saved: Collection[str], config: Mapping[str, Any]) -> bool:
    """Return whether PEFT would load a tensor as the parameter `name`; one without PEFT's prefix must be announced."""
    if _is_inner(key) or _is_whole(name, tuple(saved)):
        return True
    leaf = name.rpartition(".")[2]
    return (key != name and leaf in HALVES) or (leaf == "bias" and config.get("bias") not in (None, "none"))


def _is_whole(name: str, saved: tuple[str, ...]) -> bool:
    """Return whether a parameter belongs to a whole module, or to a module inside one."""
    parts = name.split(".")
    return any(".".join(parts[:count]).endswith(saved) for count in range(1, len(parts)))


def _is_embedding(name: str) -> bool:
    """Return whether a parameter is the weight of a token embedding or an output head."""
    return name.endswith(".weight") and any_model().role(name) in (Role.TOKENS, Role.HEAD)
