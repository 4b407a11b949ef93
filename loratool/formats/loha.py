"""LoHa (arXiv:2108.06098, arXiv:2309.14859) in PEFT's names (PEFT 0.21, ``peft.LoHaConfig``)."""

from __future__ import annotations

from typing import Final

from loratool.formats.kinds import KINDS
from loratool.formats.module_parts import ModuleParts, Parts, letter_of, refuse_rank, refuse_shape
from loratool.formats.rank_config import RankConfig, rank_parser
from loratool.updates import Update
from loratool.updates.loha import CORES, Loha

NAME: Final = "loha"
FACTORS: Final = ("w1_a", "w1_b", "w2_a", "w2_b")
_ROW: Final = KINDS[NAME]


def loha_update(module: str, parts: Parts, config: RankConfig) -> Update:
    """Return the update of a module.

    Raises:
        UnfitError: a factor is missing, or does not fit the others or the configuration.
    """
    left, right, *_ = (letter_of(parts, letter, axes=2) for letter in FACTORS)
    cores = [letter_of(parts, letter, axes=4) for letter in CORES] if any(each in parts for each in CORES) else []
    rank = left.shape[0 if cores else 1]
    for core in cores:
        refuse_shape(core, (rank, rank, *cores[0].shape[2:]))
    for letter, shape in zip(FACTORS, (left.shape, (rank, right.shape[1])) * 2, strict=True):
        refuse_shape(parts[letter], shape)
    refuse_rank(rank, config.rank_of(module))
    return Loha({letter: parts[letter] for letter in (*FACTORS, *CORES) if letter in parts}, config.scaling_of(module))


BUILDER: Final = ModuleParts(
    NAME,
    {f"hada_{letter}": letter for letter in (*FACTORS, *CORES)},
    rank_parser(_ROW.alpha_key, _ROW.keys),
    loha_update,
).builder()
