"""The exponential with the same bits on every machine: made of fp64 sums and products, each of them rounded by itself.

The functions of a mathematical library differ in their last bits from one processor to the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

LOG_2: Final = (0.6931471803691238, 1.9082149292705877e-10)
"""The natural logarithm of 2 in two parts, the first of which has few enough bits that its multiples are exact."""

EXP: Final = tuple(1 / math.factorial(power) for power in range(14))
LEAST_EXPONENT: Final = -1000


def fixed_exp(numbers: torch.Tensor) -> torch.Tensor:
    """Return e to the power of numbers of at most 0, fp64."""
    import torch

    numbers = numbers.double().clamp(min=LEAST_EXPONENT * LOG_2[0])
    powers = (numbers / math.log(2)).round()
    rest = numbers - powers * LOG_2[0] - powers * LOG_2[1]
    scale = ((powers.long() + 1023) << 52).view(torch.float64)
    return _polynomial(EXP, rest) * scale


def _polynomial(coefficients: Sequence[float], numbers: torch.Tensor) -> torch.Tensor:
    total = numbers.new_full(numbers.shape, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * numbers + coefficient
    return total
