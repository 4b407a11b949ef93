"""LoKr (arXiv:2309.14859) in PEFT's names (PEFT 0.21, ``peft.LoKrConfig``)."""

from __future__ import annotations

from typing import Final

from loratool.errors import UnsupportedError, quoted
from loratool.formats.kinds import KINDS
from loratool.formats.module_parts import ModuleParts, Parts, UnfitError, letter_of, refuse_rank, refuse_shape
from loratool.formats.rank_config import RankConfig, rank_parser
from loratool.updates import Update
from loratool.updates.lokr import CORE, SIDES, Lokr

NAME: Final = "lokr"
LETTERS: Final = (*SIDES, "w1_a", "w1_b", "w2_a", "w2_b", CORE)
CONV1D: Final = 3
KERNELS: Final = (4, 5)
"""Numbers of axes of the weights of convolutions of two and three dimensions."""

_ROW: Final = KINDS[NAME]


def lokr_update(module: str, parts: Parts, config: RankConfig) -> Update:
    """Return the update of a module.

    Raises:
        UnsupportedError: it is of a Conv1d, with a whole second factor.
        UnfitError: a factor is missing or there twice, or does not fit the others or the configuration.
    """
    rank = config.rank_of(module)
    for side in SIDES:
        pair = [f"{side}_{letter}" for letter in "ab"]
        if side not in parts:
            _refuse_unfit_product(parts, side, rank)
        elif any(letter in parts for letter in pair) or (side == "w2" and CORE in parts):
            raise UnfitError(f"has {side} both whole and as a product")
        elif side == "w2" and len(parts[side].shape) == CONV1D:
            raise UnsupportedError(
                f"{quoted(parts[side].name)} is the whole second factor of a LoKr on a Conv1d, whose product each program lays "
                "out differently; merge it with the program that trained it"
            )
        elif side == "w1" or len(parts[side].shape) not in KERNELS:
            letter_of(parts, side, axes=2)
    tensors = {letter: parts[letter] for letter in LETTERS if letter in parts}
    return Lokr(tensors, config.scaling_of(module), rank=rank)


def _refuse_unfit_product(parts: Parts, side: str, rank: int) -> None:
    left, right = (letter_of(parts, f"{side}_{letter}", axes=2) for letter in "ab")
    if side == "w2" and CORE in parts:
        core = letter_of(parts, CORE, axes=4)
        refuse_shape(core, (rank, rank, *core.shape[2:]))
        refuse_shape(left, (rank, left.shape[1]))
    else:
        refuse_rank(left.shape[1], rank, f" in {side}")
    refuse_shape(right, (rank, right.shape[1]))


BUILDER: Final = ModuleParts(
    NAME,
    {f"lokr_{letter}": letter for letter in LETTERS},
    rank_parser(_ROW.alpha_key, _ROW.keys),
    lokr_update,
).builder()
