"""HRA (arXiv:2405.17484) in PEFT's names (PEFT 0.21, ``peft.HRAConfig``): the vectors of the reflections, as columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from loratool.formats.config_reader import ConfigReader
from loratool.formats.kinds import KINDS
from loratool.formats.module_parts import ModuleParts, Parts, letter_of, refuse_rank
from loratool.formats.module_targets import ModuleTargets, target_fields
from loratool.updates import Update
from loratool.updates.hra import Hra

NAME: Final = "hra"


@dataclass(frozen=True, slots=True, kw_only=True)
class HraConfig(ModuleTargets):
    """Targets, the rank, and whether the vectors are made orthogonal by Gram and Schmidt."""

    r: int
    apply_gs: bool

    @classmethod
    def parse(cls, config: Mapping[str, Any], source: str) -> Self:
        """Check a configuration; raises like `ModuleTargets.parse`."""
        read = ConfigReader(config, source)
        fields = target_fields(config, source, KINDS[NAME].keys)
        return cls(**fields, r=read.positive_int("r"), apply_gs=read.flag("apply_GS"))


def hra_update(module: str, parts: Parts, config: HraConfig) -> Update:
    """Return the update of a module.

    Raises:
        UnfitError: its vectors are missing or not as many as the configuration says.
    """
    u = letter_of(parts, "u", axes=2)
    refuse_rank(u.shape[1], config.r)
    return Hra(parts, config.apply_gs)


BUILDER: Final = ModuleParts(NAME, {"hra_u": "u"}, HraConfig.parse, hra_update).builder()
