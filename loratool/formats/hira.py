"""HiRA (ICLR 2025) in PEFT's names (PEFT 0.21, ``peft.HiraConfig``): the two factors of the shares that are added to W."""

from __future__ import annotations

from typing import Final

from loratool.formats.kinds import KINDS
from loratool.formats.module_parts import ModuleParts, Parts, UnfitError, letter_of, refuse_shape
from loratool.formats.rank_config import ModuleRanks, module_ranks_parser
from loratool.updates import Update
from loratool.updates.hira import Hira

NAME: Final = "hira"


def hira_update(module: str, parts: Parts, config: ModuleRanks) -> Update:
    """Return the update of a module.

    Raises:
        UnfitError: a factor is missing, or does not fit the other or the configuration.
    """
    a, b = (letter_of(parts, letter, axes=2) for letter in "AB")
    refuse_shape(b, (b.shape[0], a.shape[0]))
    if a.shape[0] not in (config.r, config.rank_of(module)):  # PEFT 0.21 ignores rank_pattern
        raise UnfitError(f"has rank {a.shape[0]} and the configuration says {config.rank_of(module)}")
    return Hira(parts)


BUILDER: Final = ModuleParts(
    NAME, {"hira_A": "A", "hira_B": "B"}, module_ranks_parser(KINDS[NAME].keys), hira_update
).builder()
