"""The table of storages. A new one is a file beside this one and a row here."""

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
"""Storages whose parameters are several tensors each, of which ``config.json`` speaks in its ``quantization_config``."""

STORAGES: Final[tuple[Storage, ...]] = (*QUANTIZED, dense.STORAGE)
"""All storages, in the order in which they are asked whether a parameter is theirs."""

MAKINGS: Final[Mapping[str, MakingOf]] = {"nf4": Nf4Options.of}
"""Storages that dense parameters can be quantized to, by the names that options give them; the first one is the usual one."""

OTHERS: Final = (
    OtherStorage("bitsandbytes 8-bit (LLM.int8)", (".SCB",), four_bit.is_8_bit),
    OtherStorage("GPTQ or AWQ", (".qzeros", ".qweight")),
    OtherStorage("compressed-tensors", (".weight_packed",)),
)
"""Storages that are refused by their names."""


def stored_weight(model: Model, name: str) -> StoredWeight | None:
    """The parameter called `name` as `model` stores it, or None where no storage can read it.

    Raises:
        CheckpointError: its tensors are missing, damaged, or contradict one another.
    """
    for storage in STORAGES:
        weight = storage.claim(model, name)
        if weight is not None:
            return weight
    return None


def is_dense(weight: StoredWeight) -> bool:
    """Whether a parameter is stored in full precision."""
    return weight.storage in dense.STORAGE.names


def quantize_hint(weight: StoredWeight) -> str:
    """The end of an advice to merge into a dense model, where that can be stored as `weight` is afterwards."""
    return f", with --quantize {weight.storage} for a model like this" if weight.storage in MAKINGS else ""


def quantized_names(model: Model) -> tuple[str, ...]:
    """The names of the parameters that the names of tensors say are quantized, sorted.

    A part that is all that is left of one counts: `stored_weight` then says what is missing, or finds nothing.
    """
    found = {storage.parameter_of(name) for storage in QUANTIZED for name in model.tensors}
    return tuple(sorted(name for name in found if name is not None))


def parameter_name(tensor: str) -> str:
    """The parameter that a tensor of this name belongs to."""
    return next(name for storage in STORAGES if (name := storage.parameter_of(tensor)) is not None)


def described(config: Mapping[str, Any]) -> tuple[str, tuple[str, ...]] | None:
    """What people call the storage that a ``config.json`` speaks of, and the tags of the Hub; None where it speaks of none."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return None
    found = ((storage.describes(quantization), storage.tags) for storage in QUANTIZED)
    return next(((title, tags) for title, tags in found if title is not None), None)


def titles() -> str:
    """What people call the storages that loratool changes."""
    *others, last = (storage.title for storage in (*reversed(QUANTIZED), dense.STORAGE))
    return f"{last}, {' and '.join(others)}"


def refuse_other_storage(model: Model, path: object) -> None:
    """Raise UnsupportedError if the model at `path` is quantized in a way that is not in the table.

    Its configuration says so (``quantization_config``), or the names of its tensors do.
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
            "that it was quantized from"
        )
