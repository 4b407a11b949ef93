"""The table of storages. A new storage is a file beside this one and a row here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from loratool.errors import UnsupportedError, quoted
from loratool.weights import dense, four_bit, fp8
from loratool.weights.making import MakingOf
from loratool.weights.nf4 import Nf4Options
from loratool.weights.storage import Model, OtherStorage, Storage
from loratool.weights.stored import StoredWeight

QUANTIZED: Final = (four_bit.STORAGE, fp8.STORAGE)
"""Storages with several tensors per parameter, which ``config.json`` describes in its ``quantization_config``."""

STORAGES: Final[tuple[Storage, ...]] = (*QUANTIZED, dense.STORAGE)
"""All storages, in the order in which they may claim a parameter."""

MAKINGS: Final[Mapping[str, MakingOf]] = {"nf4": Nf4Options.of}
"""Storages that dense parameters can be quantized to, by their names in options. The first one is the default."""

QUANTIZED_TO: Final = next(iter(MAKINGS))

OTHERS: Final = (
    OtherStorage("bitsandbytes 8-bit (LLM.int8)", (".SCB",), four_bit.is_8_bit),
    OtherStorage("GPTQ or AWQ", (".qzeros", ".qweight")),
    OtherStorage("compressed-tensors", (".weight_packed",)),
)
"""Storages that are refused with a message that names them."""


def stored_weight(model: Model, name: str) -> StoredWeight | None:
    """Return the parameter called `name` as `model` stores it, or None if no storage can read it.

    Raises:
        CheckpointError: its tensors are missing, damaged or contradictory.
    """
    for storage in STORAGES:
        weight = storage.claim(model, name)
        if weight is not None:
            return weight
    return None


def is_dense(weight: StoredWeight) -> bool:
    """Return whether a parameter is stored in full precision."""
    return weight.storage in dense.STORAGE.names


def quantize_hint(weight: StoredWeight) -> str:
    """Return the end of a hint to merge into a dense model: the option that stores the result as `weight` is, or nothing."""
    return f", with --quantize {weight.storage} for a model like this" if weight.storage in MAKINGS else ""


def quantized_names(model: Model) -> tuple[str, ...]:
    """Return the sorted names of the parameters that are quantized, judged by the names of tensors alone.

    One remaining tensor of a parameter is enough; `stored_weight` then raises for the missing ones, or returns None.
    """
    found = {storage.parameter_of(name) for storage in QUANTIZED for name in model.tensors}
    return tuple(sorted(name for name in found if name is not None))


def parameter_name(tensor: str) -> str:
    """Return the parameter that a tensor of this name belongs to."""
    return next(name for storage in STORAGES if (name := storage.parameter_of(tensor)) is not None)


def described(config: Mapping[str, Any]) -> tuple[str, tuple[str, ...]] | None:
    """Return the title and the Hub's tags of the quantized storage that a ``config.json`` describes, or None."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return None
    found = ((storage.describes(quantization), storage.tags) for storage in QUANTIZED)
    return next(((title, tags) for title, tags in found if title is not None), None)


def titles() -> str:
    """Return the titles of the storages that loratool merges into, as text."""
    *others, last = (storage.title for storage in (*reversed(QUANTIZED), dense.STORAGE))
    return f"{last}, {' and '.join(others)}"


def refuse_other_storage(model: Model, path: object) -> None:
    """Raise UnsupportedError if the model at `path` has a storage that is not in the table.

    Its ``quantization_config`` or the names of its tensors show that.
    """
    config, found = model.config.get("quantization_config"), None
    if isinstance(config, dict) and described(model.config) is None:
        known = (other.title for other in OTHERS if other.describes(config))
        found = next(known, str(config.get("quant_method")))
    for name in model.tensors:
        found = found or next((other.title for other in OTHERS if name.endswith(other.ends)), None)
    if found:
        raise UnsupportedError(
            f"{quoted(path)} stores its weights as {quoted(found)}; loratool merges into {titles()} weights: use the model "
            "it was quantized from"
        )
