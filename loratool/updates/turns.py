"""Cosines and sines with the same bits on every machine: Taylor's series in integers, rounded once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

BITS: Final = 96
"""Angles and sums are whole multiples of 2**-96."""

TWO_PI: Final = 0x6487ED5110B4611A62633145C
"""2 pi."""


def cos_and_sin(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of angles, fp64, in their shape."""
    import torch

    pairs = []
    for angle in angles.flatten().tolist():
        over, under = angle.as_integer_ratio()
        pairs.append(of_angle((over << BITS) // under % TWO_PI))
    found = torch.tensor(pairs, dtype=torch.float64, device=angles.device).view(*angles.shape, 2)
    return found[..., 0], found[..., 1]


def of_angle(angle: int) -> tuple[float, float]:
    """Return cos and sin of an angle from 0 to 2 pi, in units of 2**-96."""
    total, term, power = [1 << BITS, 0], 1 << BITS, 0
    while term:
        power += 1
        term = term * angle // power >> BITS
        total[power % 2] += -term if power % 4 in (2, 3) else term
    return total[0] / (1 << BITS), total[1] / (1 << BITS)
