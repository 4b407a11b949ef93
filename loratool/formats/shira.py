"""SHiRA (arXiv:2406.13175) in PEFT's names (PEFT 0.21, ``peft.ShiraConfig``); the file itself holds the indices."""

from __future__ import annotations

from typing import Final

from loratool.formats.kinds import KINDS
from loratool.formats.module_parts import ModuleParts, Parts, UnfitError, letter_of, refuse_shape
from loratool.formats.module_targets import ModuleTargets, targets_parser
from loratool.updates import Update
from loratool.updates.shira import Shira

NAME: Final = "shira"
DTYPES: Final = ("I32", "I64", "F32")
"""Dtypes of indices; PEFT saves fp32 on Windows."""


def shira_update(module: str, parts: Parts, config: ModuleTargets) -> Update:
    """Return the update of a module.

    Raises:
        UnfitError: a tensor is missing, has another shape, or the indices are of another dtype.
    """
    values, indices = letter_of(parts, "values", axes=1), letter_of(parts, "indices", axes=2)
    refuse_shape(indices, (2, values.shape[0]))
    if indices.dtype not in DTYPES:
        raise UnfitError(f"has indices of the dtype {indices.dtype}, which must be {', '.join(DTYPES)}")
    return Shira(dict(parts))


BUILDER: Final = ModuleParts(
    NAME, {"shira_weight": "values", "shira_indices": "indices"}, targets_parser(KINDS[NAME].keys), shira_update
).builder()
