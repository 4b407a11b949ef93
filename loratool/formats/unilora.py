"""Uni-LoRA (arXiv:2506.00799) in PEFT's names (PEFT 0.21, ``peft.UniLoraConfig``), with saved indices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from loratool.errors import UnsupportedError, quoted
from loratool.formats.config_reader import ConfigReader
from loratool.formats.kinds import KINDS
from loratool.formats.module_parts import ModuleParts, Parts, UnfitError, letter_of, refuse_rank, refuse_shape
from loratool.formats.rank_config import ModuleRanks, module_rank_fields
from loratool.updates import Update
from loratool.updates.unilora import INDICES, THETA, UniLora

NAME: Final = "unilora"
SAVED: Final = "save_indices"
DTYPES: Final = ("I32", "I64")


def _parse(config: Mapping[str, Any], source: str) -> ModuleRanks:
    if not ConfigReader(config, source).flag(SAVED):
        raise UnsupportedError(
            f"{quoted(source)} is a Uni-LoRA without its indices ({SAVED} is not true), which PEFT draws for the modules in the "
            f"order of the model's code, which no file tells; load it in PEFT and save it again with {SAVED}=True"
        )
    return ModuleRanks(**module_rank_fields(config, source, KINDS[NAME].keys))


def unilora_update(module: str, parts: Parts, config: ModuleRanks) -> Update:
    """Return the update of a module.

    Raises:
        UnfitError: a tensor is missing, or does not fit the others or the configuration.
    """
    letter_of(parts, THETA, axes=1)
    for letter in "AB":
        indices = letter_of(parts, f"{INDICES}_{letter}", axes=2)
        refuse_shape(letter_of(parts, f"scales_{letter}"), indices.shape)
        rank = indices.shape[0 if letter == "A" else 1]
        refuse_rank(rank, config.r)
        if indices.dtype not in DTYPES:
            raise UnfitError(f"has indices of the dtype {indices.dtype}, which must be {', '.join(DTYPES)}")
    return UniLora(dict(parts))


BUILDER: Final = ModuleParts(
    NAME,
    {f"unilora_{part}_{letter}": f"{part}_{letter}" for part in (INDICES, "scales") for letter in "AB"},
    _parse,
    unilora_update,
    {"unilora_theta_d": THETA},
).builder()
