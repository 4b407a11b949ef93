"""Random projections that all modules of an adapter share: drawn from a seed as PEFT draws them (Kaiming, uniform)."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from loratool.updates import Places

if TYPE_CHECKING:
    import torch

GAIN: Final = math.sqrt(2)


@lru_cache(maxsize=2)
def drawn(seed: int, rows: int, rank: int, places: Places, *, fixed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (rows, most inputs) and B (most outputs, rank), fp32, rounded to each dtype of the base as PEFT does.

    torch computes a uniform number by a product and a sum, which some machines round once and others twice. With `fixed` the
    numbers are the nearest ones, so that they have the same bits on every machine.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    pair = []
    for shape in ((rows, places.inputs), (places.outputs, rank)):
        bound = math.sqrt(3.0) * (GAIN / math.sqrt(shape[1]))
        if fixed:
            unit = torch.empty(shape).uniform_(0, 1, generator=generator).double()
            numbers = (unit * (2 * bound) - bound).float()
        else:
            numbers = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        for dtype in sorted(places.dtypes, key=lambda dtype: dtype.title):
            numbers = numbers.to(dtype.as_torch()).float()
        pair.append(numbers)
    return pair[0], pair[1]
