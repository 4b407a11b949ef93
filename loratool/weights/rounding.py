"""Chance for codecs that round by it: the same on every machine and device, for the same seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

    from loratool.weights.feedback import Feedback
    from loratool.weights.output_feedback import OutputFeedback

    Tensor = torch.Tensor

ROUNDS: Final = 10
MULTIPLIERS: Final = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
WEYL: Final = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
"""The constants of Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3)."""

HALF: Final = (1 << 32) - 1

WORDS: Final = 1 << 16
"""So many words of 16 bits there are."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a matrix is rounded to a storage that is much coarser than what was added to it.

    `seed`, below 2**64, is made from what is merged, so that equal merges give equal bytes. With `feedback` errors are
    passed on between columns, else with `outputs` between rows, unless the change is large. That cannot be taken back by asking
    chance again.
    """

    seed: int
    feedback: Feedback | None = None
    outputs: OutputFeedback | None = None

    def words(self, rows: range, count: int, device: torch.device) -> Tensor:
        """`count` random words of 16 bits, int16, for a block that begins with row ``rows.start``; `noise_of` tells more.

        They are those of Philox4x64-10 with the seed and the row as its key, made by numpy, or on another device than a CPU
        there.
        """
        import numpy as np
        import torch

        if device.type == "cpu":
            key = np.array([self.seed, rows.start], np.uint64)  # of a list numpy makes floating-point numbers
            raw = np.random.Philox(key=key).random_raw(-(-count // 4)).astype("<u8", copy=False)
            words = torch.from_numpy(raw.view("<i2")[:count].astype(np.int16, copy=False))
        else:
            words = philox((self.seed, rows.start), -(-count // 16), device).view(torch.int16)[:count]
        return words.bitwise_xor_(-WORDS // 2)  # from 0 to 65535 as they are made


def noise_of(words: Tensor) -> Tensor:
    """Chance that `words` from -32768 to 32767 stand for, fp32: between 0 and 1."""
    return words.float().add_((WORDS + 1) / 2).div_(WORDS)


def philox(key: tuple[int, int], count: int, device: torch.device) -> Tensor:
    """The first `count` blocks of four 64-bit words of Philox4x64-10, as numpy's ``Philox(key)`` gives them: int64, flat."""
    import torch

    # numpy raises the counter before it makes a block.
    first = torch.arange(1, count + 1, device=device)
    words = [first, *(torch.zeros_like(first) for _ in range(3))]
    for turn in range(ROUNDS):
        keys = [_signed(word + turn * weyl) for word, weyl in zip(key, WEYL, strict=True)]
        high_0, low_0 = _product(words[0], MULTIPLIERS[0])
        high_1, low_1 = _product(words[2], MULTIPLIERS[1])
        words = [high_1 ^ words[1] ^ keys[0], low_1, high_0 ^ words[3] ^ keys[1], low_0]
    return torch.stack(words, 1).view(-1)


def _product(numbers: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """The upper and lower 64 bits of a product of unsigned 64-bit numbers; torch multiplies modulo 2**64."""
    low, high = numbers & HALF, (numbers >> 32) & HALF
    by_low, by_high = by & HALF, by >> 32
    # A half times a half can reach 2**63 and more, which torch's signed numbers wrap; their bits are right.
    middle = high * by_low + _upper(low * by_low)
    cross = low * by_high + (middle & HALF)
    return high * by_high + _upper(middle) + _upper(cross), numbers * _signed(by)


def _upper(numbers: Tensor) -> Tensor:
    """The upper 32 of 64 bits, as an unsigned number."""
    return (numbers >> 32) & HALF


def _signed(number: int) -> int:
    """The signed number with the last 64 bits of this one."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number
