"""LoHa (arXiv:2108.06098, arXiv:2309.14859) in PEFT's names (PEFT 0.21, ``peft.LoHaConfig``)."""

from __future__ import annotations

from typing import Final

from loratool.errors import UnsupportedError, quoted
from loratool.formats.kinds import KINDS, NOT_YET
from loratool.formats.module_parts import ModuleParts, Parts, UnfitError, letter_of, refuse_shape
from loratool.formats.rank_config import RankConfig, rank_parser
from loratool.updates import Update
from loratool.updates.loha import Loha

NAME: Final = "loha"
FACTORS: Final = ("w1_a", "w1_b", "w2_a", "w2_b")
CORES: Final = ("t1", "t2")
_ROW: Final = KINDS[NAME]


def loha_update(module: str, parts: Parts, config: RankConfig) -> Update:
    """Return the update of a module.

    Raises:
        UnsupportedError: it has Tucker cores, which only convolutions have.
        UnfitError: a factor is missing, or does not fit the others or the configuration.
    """
    core = next((parts[letter] for letter in CORES if letter in parts), None)
    if core is not None:
        raise UnsupportedError(f"{quoted(core.name)} is the Tucker core of a LoHa on a convolution: {NOT_YET}")
    left, right, *_ = (letter_of(parts, letter, axes=2) for letter in FACTORS)
    rank = left.shape[1]
    for letter, shape in zip(FACTORS, (left.shape, (rank, right.shape[1])) * 2, strict=True):
        refuse_shape(parts[letter], shape)
    if rank != config.rank_of(module):
        raise UnfitError(f"has rank {rank} and the configuration says {config.rank_of(module)}")
    return Loha({letter: parts[letter] for letter in FACTORS}, config.scaling_of(module))


BUILDER: Final = ModuleParts(
    NAME,
    {f"hada_{letter}": letter for letter in (*FACTORS, *CORES)},
    rank_parser(_ROW.alpha_key, _ROW.keys),
    loha_update,
).builder()
