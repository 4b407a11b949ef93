"""GLoRA (arXiv:2306.07967) in PEFT's names (PEFT 0.21, ``peft.GloraConfig``): the terms A to E, each in one of four forms."""

from __future__ import annotations

from typing import Final

from loratool.errors import UnsupportedError, quoted
from loratool.formats.kinds import KINDS
from loratool.formats.module_parts import ModuleParts, Parts, UnfitError, refuse_shape
from loratool.formats.module_targets import ModuleTargets, targets_parser
from loratool.updates import Update
from loratool.updates.glora import Glora, GloraBias
from loratool.updates.shapes import ANY

NAME: Final = "glora"
FORMS: Final = ("X", "Xd", "Xu", "zeros")
LETTERS: Final = {f"glora_{term}.{form}": f"{term}.{form}" for term in "ABCDE" for form in FORMS}


def glora_update(module: str, parts: Parts, config: ModuleTargets) -> Update:
    """Return the update of a module.

    Raises:
        UnsupportedError: its bias depends on its weight.
        UnfitError: a term is missing, or does not fit the others.
    """
    bias = next((parts[letter] for letter in ("C.X", "C.Xd") if letter in parts), None)
    if bias is not None:
        raise UnsupportedError(
            f"{quoted(bias.name)} is multiplied by the weight and added to the bias (config_C), which loratool does not compute; "
            "merge it with PEFT"
        )
    outputs = inputs = ANY
    for term in "AB":
        rows, columns = _sides(term, parts)
        if (ANY not in (rows, outputs) and rows != outputs) or (ANY not in (columns, inputs) and columns != inputs):
            raise UnfitError("has terms A and B of different sizes")
        outputs, inputs = rows or outputs, columns or inputs
    for term in "DE":
        x = parts.get(f"{term}.X")
        if x is not None and x.shape != (1,) and outputs == ANY:
            outputs = x.shape[0]
        if x is not None and x.shape != (1,):
            refuse_shape(x, (outputs,))
        elif x is None and f"{term}.zeros" not in parts:
            raise UnfitError(f"has no glora_{term}")
    return Glora(dict(parts), (outputs, inputs))


def _sides(term: str, parts: Parts) -> tuple[int, int]:
    """Return the outputs and inputs that a term of the weight tells."""
    x, down, up = (parts.get(f"{term}.{form}") for form in ("X", "Xd", "Xu"))
    if down is not None and up is not None:
        if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[1] != up.shape[0]:
            raise UnfitError(
                f"has factors Xd {list(down.shape)} and Xu {list(up.shape)} of {term}, which do not fit together"
            )
        return down.shape[0], up.shape[1]
    if down is not None or up is not None:
        raise UnfitError(f"has no glora_{term}.{'Xd' if down is None else 'Xu'}")
    if x is not None:
        if x.shape == (1,):
            return ANY, ANY
        refuse_shape(x, (x.shape[0], 1))
        return x.shape[0], ANY
    zeros = parts.get(f"{term}.zeros")
    if zeros is None or len(zeros.shape) != 2:
        raise UnfitError(f"has no glora_{term}")
    return zeros.shape[0], zeros.shape[1]


def _bias(update: Update) -> Update | None:
    """Return the update of the bias, if it has terms."""
    own = {letter: info for letter, info in update.tensors.items() if letter in ("D.X", "E.X")}
    return GloraBias(own, (update.shape[0],)) if own else None


BUILDER: Final = ModuleParts(NAME, LETTERS, targets_parser(KINDS[NAME].keys), glora_update, bias=_bias).builder()
