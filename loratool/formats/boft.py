"""BOFT (arXiv:2311.06243) in PEFT's names (PEFT 0.21, ``peft.BOFTConfig``): blocks R and a factor s for each output."""

from __future__ import annotations

from typing import Final

from loratool.errors import UnsupportedError, quoted
from loratool.formats.kinds import KINDS
from loratool.formats.module_parts import ModuleParts, Parts, letter_of, refuse_shape
from loratool.formats.module_targets import ModuleTargets, targets_parser
from loratool.updates import Update
from loratool.updates.boft import Boft

NAME: Final = "boft"


def boft_update(module: str, parts: Parts, config: ModuleTargets) -> Update:
    """Return the update of a module.

    Raises:
        UnsupportedError: it has several butterfly factors, or is a convolution.
        UnfitError: a tensor is missing or has an impossible shape.
    """
    r, s = letter_of(parts, "R", axes=4), letter_of(parts, "s", axes=2)
    factors, blocks, n, _ = r.shape
    refuse_shape(r, (factors, blocks, n, n))
    if factors > 1:
        raise UnsupportedError(
            f"{quoted(r.name)} has {factors} butterfly factors, which PEFT itself merges only with its CUDA extension; "
            "merge it with PEFT on the machine that trained it"
        )
    if s.shape[0] == 1 < s.shape[1]:
        raise UnsupportedError(f"{quoted(s.name)} is that of a convolution; merge it with PEFT")
    refuse_shape(s, (s.shape[0], 1))
    return Boft(parts, NAME)


BUILDER: Final = ModuleParts(
    NAME, {"boft_R": "R", "boft_s": "s"}, targets_parser(KINDS[NAME].keys), boft_update
).builder()
