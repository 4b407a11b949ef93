"""DeLoRA (arXiv:2503.18225) in PEFT's names (PEFT 0.21, ``peft.DeloraConfig``)."""

from __future__ import annotations

from typing import Final

from loratool.formats.kinds import KINDS
from loratool.formats.module_parts import ModuleParts, Parts, letter_of, refuse_rank, refuse_shape
from loratool.formats.rank_config import ModuleRanks, module_ranks_parser
from loratool.updates import Update
from loratool.updates.delora import Delora

NAME: Final = "delora"


def delora_update(module: str, parts: Parts, config: ModuleRanks) -> Update:
    """Return the update of a module.

    Raises:
        UnfitError: a tensor is missing, or does not fit the others or the configuration.
    """
    a, b = (letter_of(parts, letter, axes=2) for letter in "AB")
    refuse_shape(b, (b.shape[0], a.shape[0]))
    refuse_shape(letter_of(parts, "lambda"), (1,))
    refuse_shape(letter_of(parts, "w_norm"), (a.shape[1],))
    refuse_rank(a.shape[0], config.rank_of(module))
    return Delora(dict(parts))


BUILDER: Final = ModuleParts(
    NAME,
    {"delora_A": "A", "delora_B": "B", "delora_lambda": "lambda", "delora_w_norm": "w_norm"},
    module_ranks_parser(KINDS[NAME].keys),
    delora_update,
).builder()
