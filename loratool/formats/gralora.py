"""GraLoRA (arXiv:2505.20355) in PEFT's names (PEFT 0.21, ``peft.GraloraConfig``), with or without its hybrid LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Self

from loratool.errors import AdapterError, quoted
from loratool.formats.config_reader import ConfigReader
from loratool.formats.kinds import KINDS
from loratool.formats.loadable import whole
from loratool.formats.module_parts import ModuleParts, Parts, UnfitError, letter_of, refuse_shape
from loratool.formats.rank_config import RankConfig, without_patterns
from loratool.updates import Update
from loratool.updates.gralora import GraLora

NAME: Final = "gralora"
GENERAL: Final = ("general_A", "general_B")
_ROW: Final = KINDS[NAME]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraLoraConfig(RankConfig):
    """Rank, alpha and targets, the number of blocks on a side, and the rank of the hybrid LoRA."""

    gralora_k: int
    hybrid_r: int

    @classmethod
    def parse(cls, config: Mapping[str, Any], source: str) -> Self:
        """Check a configuration.

        Raises:
            AdapterError: a value is missing or impossible.
        """
        common = without_patterns(config, source, _ROW.alpha_key, _ROW.keys)
        hybrid_r = whole(config.get("hybrid_r", 0))
        if type(hybrid_r) is not int or hybrid_r < 0:
            raise AdapterError(
                f"'hybrid_r' in {quoted(source)} is {quoted(hybrid_r, 40)} and must be a whole number of at least 0"
            )
        k = ConfigReader(config, source).positive_int("gralora_k")
        if common.r % k:
            raise AdapterError(f"'r' in {quoted(source)} is {common.r}, which gralora_k={k} does not divide")
        values = {field.name: getattr(common, field.name) for field in fields(common)}
        return cls(**values, gralora_k=k, hybrid_r=hybrid_r)

    def scaling_of(self, module: str) -> float:
        """Return the scaling, ``alpha / (r + hybrid_r)``."""
        return self.alpha / (self.r + self.hybrid_r)


def gralora_update(module: str, parts: Parts, config: GraLoraConfig) -> Update:
    """Return the update of a module.

    Raises:
        UnfitError: a tensor is missing, or does not fit the others or the configuration.
    """
    a, b = (letter_of(parts, letter, axes=3) for letter in "AB")
    refuse_shape(a, (config.gralora_k, a.shape[1], config.r))
    refuse_shape(b, (config.gralora_k, config.r, b.shape[2]))
    if not config.hybrid_r:
        if any(letter in parts for letter in GENERAL):
            raise UnfitError("has the LoRA of a hybrid, and its hybrid_r is 0")
        return GraLora({"A": a, "B": b}, config.scaling_of(module))
    left, right = (letter_of(parts, letter, axes=2) for letter in GENERAL)
    refuse_shape(left, (config.hybrid_r, a.shape[0] * a.shape[1]))
    refuse_shape(right, (b.shape[0] * b.shape[2], config.hybrid_r))
    return GraLora({"A": a, "B": b, GENERAL[0]: left, GENERAL[1]: right}, config.scaling_of(module))


BUILDER: Final = ModuleParts(
    NAME,
    {
        "gralora_A": "A",
        "gralora_B": "B",
        "gralora_A_general.weight": GENERAL[0],
        "gralora_B_general.weight": GENERAL[1],
    },
    GraLoraConfig.parse,
    gralora_update,
).builder()
