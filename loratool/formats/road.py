"""RoAd (arXiv:2409.00119) in PEFT's names (PEFT 0.21, ``peft.RoadConfig``): angles and scales of pairs of outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from loratool.checkpoint.blocks import BLOCK_ROWS
from loratool.errors import AdapterError, UnsupportedError, quoted
from loratool.formats.config_reader import ConfigReader
from loratool.formats.kinds import KINDS
from loratool.formats.module_parts import ModuleParts, Parts, UnfitError, letter_of, refuse_shape
from loratool.formats.module_targets import ModuleTargets, target_fields
from loratool.updates import Update
from loratool.updates.road import ANGLES, Road
from loratool.updates.shapes import ANY

NAME: Final = "road"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoadConfig(ModuleTargets):
    """Targets, the variant, and the number of outputs of a group."""

    variant: str
    group_size: int

    @classmethod
    def parse(cls, config: Mapping[str, Any], source: str) -> Self:
        """Check a configuration.

        Raises:
            UnsupportedError: its groups do not divide a block of rows.
            AdapterError: a value is missing or impossible.
        """
        variant, group = config.get("variant"), ConfigReader(config, source).positive_int("group_size")
        if variant not in ANGLES:
            raise AdapterError(
                f"'variant' in {quoted(source)} is {quoted(variant, 40)} and must be one of {', '.join(ANGLES)}"
            )
        if group % 2 or BLOCK_ROWS % group:
            raise UnsupportedError(
                f"{quoted(source)} has groups of {group} outputs; loratool computes 2, 4, ... {BLOCK_ROWS}: merge it with PEFT"
            )
        return cls(**target_fields(config, source, KINDS[NAME].keys), variant=str(variant), group_size=group)


def road_update(module: str, parts: Parts, config: RoadConfig) -> Update:
    """Return the update of a module.

    Raises:
        UnfitError: a tensor is missing, or of another length than groups have.
    """
    theta = letter_of(parts, "theta", axes=1)
    refuse_shape(letter_of(parts, "alpha"), theta.shape)
    outputs = int(theta.shape[0] / ANGLES[config.variant])
    if outputs * ANGLES[config.variant] != theta.shape[0] or outputs % config.group_size:
        raise UnfitError(
            f"has {theta.shape[0]} angles, which are those of no whole groups of {config.group_size} outputs"
        )
    return Road(parts, config.variant, config.group_size, (outputs, ANY))


def _bias(update: Update) -> Update | None:
    """Return the update of the bias, which turns with the outputs."""
    assert isinstance(update, Road)
    return Road(update.tensors, update.variant, update.group, update.size[:1])


BUILDER: Final = ModuleParts(
    NAME, {"road_theta": "theta", "road_alpha": "alpha"}, RoadConfig.parse, road_update, bias=_bias
).builder()
