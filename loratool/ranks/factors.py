"""The factors of an update as numbers: what every operation on adapters begins with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.errors import UnsupportedError, quoted
from loratool.updates import Update
from loratool.updates.low_rank import read_factor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Factors:
    """``scaling * B A`` with A (r, in_features) and B (out_features, r), fp32, on the CPU."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def load_factors(update: Update, module: str) -> Factors:
    """Read the factors of `module`; AdaLoRA's E is multiplied into A (Zhang et al. 2023, arXiv:2303.10512, eq. 3).

    Raises:
        UnsupportedError: the update is no product of factors.
        AdapterError: a number is NaN or infinite.
    """
    infos = update.factors
    if not {"A", "B"} <= set(infos) <= {"A", "B", "E"}:
        raise UnsupportedError(
            f"{quoted(module)} is changed by {quoted(update.kind)}, which is no product of factors and has no ranks"
        )
    a, b = read_factor(infos["A"])[: update.rank], read_factor(infos["B"])[:, : update.rank]
    if "E" in infos:
        a = a * read_factor(infos["E"])
    return Factors(a, b, update.scaling)
