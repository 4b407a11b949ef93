"""MiSS (arXiv:2409.15371), formerly Bone, in PEFT's names (PEFT 0.21, ``peft.MissConfig``), in all its modes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from loratool.errors import AdapterError, quoted
from loratool.formats.config_reader import ConfigReader
from loratool.formats.kinds import KINDS
from loratool.formats.module_parts import ModuleParts, Parts, letter_of, refuse_rank, refuse_shape
from loratool.formats.rank_config import ModuleRanks, module_rank_fields
from loratool.updates import Update
from loratool.updates.miss import Miss, MissBat

NAME: Final = "miss"
BAT: Final = "bat"
MINI: Final = "mini"
INIT: Final = "init_weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class MissConfig(ModuleRanks):
    """Targets, r, and the mode, which PEFT calls an initialization: plain (``""``), ``bat`` or ``mini`` with its `mini_r`."""

    mode: str
    mini_r: int

    @classmethod
    def parse(cls, config: Mapping[str, Any], source: str) -> Self:
        """Check a configuration.

        Raises:
            AdapterError: a value is missing or impossible.
        """
        init = config.get(INIT, True)
        if not (init is None or isinstance(init, bool) or init in (BAT, MINI)):
            raise AdapterError(
                f"{quoted(INIT)} in {quoted(source)} is {quoted(init, 40)} and must be true, false, bat or mini"
            )
        mode = init if isinstance(init, str) else ""
        mini_r = ConfigReader(config, source).positive_int("mini_r") if mode == MINI else 1
        return cls(**module_rank_fields(config, source, KINDS[NAME].keys), mode=mode, mini_r=mini_r)


def miss_update(module: str, parts: Parts, config: MissConfig) -> Update:
    """Return the update of a module.

    Raises:
        UnfitError: its tensor has another shape than the configuration asks for.
    """
    info = letter_of(parts, "B", axes=3 if config.mode == BAT else 2)
    if config.mode == BAT:
        refuse_shape(info, (info.shape[0], info.shape[1], info.shape[1]))
    if config.mode == MINI:
        refuse_shape(info, (info.shape[0], config.mini_r))
    rank = info.shape[1 if config.mode == BAT else 0]
    refuse_rank(rank, config.r)
    return MissBat({"B": info}) if config.mode == BAT else Miss({"B": info}, mini=config.mode == MINI)


BUILDER: Final = ModuleParts(NAME, {"miss_block": "B"}, MissConfig.parse, miss_update).builder()
