"""RandLoRA (arXiv:2502.00987) in PEFT's names (PEFT 0.21, ``peft.RandLoraConfig``), with saved projections.

PEFT saves the projections once for all modules, and again with each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from loratool.errors import UnsupportedError, quoted
from loratool.formats.config_reader import ConfigReader
from loratool.formats.kinds import KINDS
from loratool.formats.module_parts import ModuleParts, Parts, letter_of, refuse_rank, refuse_shape
from loratool.formats.rank_config import RankConfig, without_patterns
from loratool.updates import Update
from loratool.updates.randlora import RandLora

NAME: Final = "randlora"
SAVED: Final = "save_projection"
SHARED: Final = ("A", "B")
COPIES: Final = ("own_A", "own_B")
_ROW: Final = KINDS[NAME]


def _parse(config: Mapping[str, Any], source: str) -> RankConfig:
    if SAVED in config and not ConfigReader(config, source).flag(SAVED):
        raise UnsupportedError(
            f"{quoted(source)} is a RandLoRA without its projections ({SAVED} is false), which PEFT draws differently from "
            f"machine to machine; save it again, where it was trained, with {SAVED}=True"
        )
    return without_patterns(config, source, _ROW.alpha_key, _ROW.keys)


def randlora_update(module: str, parts: Parts, config: RankConfig) -> Update:
    """Return the update of a module.

    Raises:
        UnfitError: a tensor is missing, or does not fit the others or the configuration.
    """
    scales, gamma = letter_of(parts, "lambda", axes=2), letter_of(parts, "gamma", axes=2)
    a, b = (letter_of(parts, letter, axes=3) for letter in SHARED)
    refuse_rank(scales.shape[0], config.rank_of(module))
    rank, count = scales.shape
    refuse_shape(gamma, (count, gamma.shape[1]))
    refuse_shape(a, (rank, 1, max(a.shape[2], gamma.shape[1])))
    refuse_shape(b, (b.shape[0], max(b.shape[1], count), rank))
    for copy, shared in zip(COPIES, (a, b), strict=True):
        if copy in parts:
            refuse_shape(parts[copy], shared.shape)
    return RandLora({"lambda": scales, "gamma": gamma, "A": a, "B": b}, config.scaling_of(module))


BUILDER: Final = ModuleParts(
    NAME,
    {"randlora_lambda": "lambda", "randlora_gamma": "gamma", "randlora_A": COPIES[0], "randlora_B": COPIES[1]},
    _parse,
    randlora_update,
    {f"randlora_{letter}": letter for letter in SHARED},
).builder()
