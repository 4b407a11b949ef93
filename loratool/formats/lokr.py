"""LoKr (arXiv:2309.14859) in PEFT's names (PEFT 0.21, ``peft.LoKrConfig``)."""

from __future__ import annotations

from typing import Final

from loratool.errors import UnsupportedError, quoted
from loratool.formats.kinds import KINDS, NOT_YET
from loratool.formats.module_parts import ModuleParts, Parts, UnfitError, letter_of, refuse_shape
from loratool.formats.rank_config import RankConfig, rank_parser
from loratool.updates import Update
from loratool.updates.lokr import SIDES, Lokr

NAME: Final = "lokr"
CORE: Final = "t2"
LETTERS: Final = (*SIDES, "w1_a", "w1_b", "w2_a", "w2_b")
_ROW: Final = KINDS[NAME]


def lokr_update(module: str, parts: Parts, config: RankConfig) -> Update:
    """Return the update of a module.

    Raises:
        UnsupportedError: it has a Tucker core, which only convolutions have.
        UnfitError: a factor is missing or there twice, or does not fit the others or the configuration.
    """
    if CORE in parts:
        raise UnsupportedError(f"{quoted(parts[CORE].name)} is the Tucker core of a LoKr on a convolution: {NOT_YET}")
    rank = config.rank_of(module)
    for side in SIDES:
        pair = [f"{side}_{letter}" for letter in "ab"]
        if side not in parts:
            left, right = (letter_of(parts, letter, axes=2) for letter in pair)
            refuse_shape(right, (left.shape[1], right.shape[1]))
            if left.shape[1] != rank:
                raise UnfitError(f"has rank {left.shape[1]} in {side} and the configuration says {rank}")
        elif any(letter in parts for letter in pair):
            raise UnfitError(f"has {side} both whole and as a product")
        elif len(letter_of(parts, side).shape) > 2:
            raise UnsupportedError(f"{quoted(parts[side].name)} is of a LoKr on a convolution: {NOT_YET}")
        else:
            letter_of(parts, side, axes=2)
    tensors = {letter: parts[letter] for letter in LETTERS if letter in parts}
    return Lokr(tensors, config.scaling_of(module), rank=rank)


BUILDER: Final = ModuleParts(
    NAME,
    {f"lokr_{letter}": letter for letter in (*LETTERS, CORE)},
    rank_parser(_ROW.alpha_key, _ROW.keys),
    lokr_update,
).builder()
