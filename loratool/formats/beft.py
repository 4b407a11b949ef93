"""BEFT in PEFT's names (PEFT 0.21, ``peft.BeftConfig``): ``X.beft_bias``, (1, out_features), which is added to a layer's bias."""

from __future__ import annotations

import math
from typing import Final

from loratool.errors import quoted
from loratool.formats.kinds import KINDS
from loratool.formats.module_parts import ModuleParts, Parts, UnfitError, letter_of
from loratool.formats.module_targets import ModuleTargets, targets_parser
from loratool.updates import Update
from loratool.updates.vector import Vector

NAME: Final = "beft"


def beft_update(module: str, parts: Parts, config: ModuleTargets) -> Update:
    """Return the update of a module's bias.

    Raises:
        UnfitError: it is not one vector.
    """
    info = letter_of(parts, "v")
    if max(info.shape, default=1) != math.prod(info.shape):
        raise UnfitError(f"has {quoted(info.name)} of shape {list(info.shape)}, which must be one vector")
    return Vector(NAME, info)


BUILDER: Final = ModuleParts(
    NAME, {"beft_bias": "v"}, targets_parser(KINDS[NAME].keys), beft_update, leaf="bias"
).builder()
