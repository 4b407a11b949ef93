"""Super-Tuning in PEFT's names (PEFT 0.21, ``peft.SupertuningConfig``): numbers, their places, and perhaps factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from loratool.errors import UnsupportedError, quoted
from loratool.formats.config_reader import ConfigReader
from loratool.formats.kinds import KINDS
from loratool.formats.module_parts import ModuleParts, Parts, UnfitError, letter_of, refuse_shape
from loratool.formats.module_targets import ModuleTargets, target_fields
from loratool.updates import Update
from loratool.updates.supertuning import Supertuning

NAME: Final = "supertuning"
INDEX_DTYPES: Final = ("I32", "I64")


@dataclass(frozen=True, slots=True, kw_only=True)
class SupertuningConfig(ModuleTargets):
    """Targets, and rank and alpha of the product; None without one."""

    r: int | None
    lora_alpha: float

    @classmethod
    def parse(cls, config: Mapping[str, Any], source: str) -> Self:
        """Check a configuration; raises like `ModuleTargets.parse`."""
        read = ConfigReader(config, source)
        fields = target_fields(config, source, KINDS[NAME].keys)
        if config.get("r") is None:
            return cls(**fields, r=None, lora_alpha=0.0)
        return cls(**fields, r=read.positive_int("r"), lora_alpha=read.number("lora_alpha"))


def supertuning_update(module: str, parts: Parts, config: SupertuningConfig) -> Update:
    """Return the update of a module.

    Raises:
        UnsupportedError: it does not hold the places of its numbers.
        UnfitError: a tensor is missing or has another shape or dtype.
    """
    values = letter_of(parts, "values", axes=1)
    indices = parts.get("indices")
    if indices is None:
        raise UnsupportedError(
            f"{quoted(values.name)} has no supertuning_indices beside it: PEFT finds the places by the largest weights of the "
            "base, in an order that machines differ in; load it in PEFT on that base, set save_precomputed_indices, and save it"
        )
    refuse_shape(indices, values.shape)
    if indices.dtype not in INDEX_DTYPES:
        raise UnfitError(f"has indices of the dtype {indices.dtype}, which must be {' or '.join(INDEX_DTYPES)}")
    if config.r is None:
        if "A" in parts or "B" in parts:
            raise UnfitError("has factors, and the configuration has no r")
        return Supertuning(parts)
    a, b = (letter_of(parts, letter, axes=2) for letter in "AB")
    refuse_shape(a, (config.r, a.shape[1]))
    refuse_shape(b, (b.shape[0], config.r))
    return Supertuning(parts, config.lora_alpha / config.r)


BUILDER: Final = ModuleParts(
    NAME,
    {
        "supertuning_values": "values", "supertuning_indices": "indices",
        "supertuning_lora_A.weight": "A", "supertuning_lora_B.weight": "B",
    },
    SupertuningConfig.parse,
    supertuning_update,
).builder()  # fmt: skip
