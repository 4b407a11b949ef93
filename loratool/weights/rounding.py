"""Chance for storages that round by it: the same on every machine and device, for the same seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

    from loratool.weights.coarse.feedback import Feedback
    from loratool.weights.coarse.output_feedback import OutputFeedback

    Tensor = torch.Tensor

ROUNDS: Final = 10
MULTIPLIERS: Final = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
WEYL: Final = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
"""The constants of Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3)."""

HALF: Final = (1 << 32) - 1

WORDS: Final = 1 << 16
"""The number of words of 16 bits that differ."""

WORDS_OF_A_BLOCK: Final = 16
"""Words of 16 bits in a block of Philox's."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a parameter is rounded to a storage that is coarser than what was added to it.

    `seed`, below 2**64, is made from what is merged, so that equal merges give equal bytes. With `feedback` errors are passed on
    between inputs, else with `outputs` between outputs, unless the change is large. Chance alone does not lead back from that.
    """

    seed: int
    feedback: Feedback | Callable[[range], Feedback] | None = None
    outputs: OutputFeedback | None = None

    def feedback_for(self, inputs: range) -> Feedback | None:
        """The feedback for a block of these inputs: that of all, or, where blocks have some alone, one of their own."""
        return self.feedback(inputs) if callable(self.feedback) else self.feedback

    def words(self, rows: range, count: int, device: torch.device) -> Tensor:
        """`count` random words of 16 bits, int16, flat, for a block that begins with row ``rows.start``; see `noise_of`.

        They are those of Philox4x64-10 with the seed and the row as its key.
        """
        return _words((self.seed, rows.start), 0, -(-count // WORDS_OF_A_BLOCK), device)[:count]

    def words_of_rows(self, rows: range, columns: int, device: torch.device) -> Tensor:
        """Random words of 16 bits, int16, (rows, columns), which do not depend on the block that the rows are part of.

        They are those of Philox4x64-10 with the seed as its key; each row begins a block of these of its own.
        """
        blocks = -(-columns // WORDS_OF_A_BLOCK)
        words = _words((self.seed, 0), rows.start * blocks, len(rows) * blocks, device)
        return words.view(len(rows), -1)[:, :columns]


def _words(key: tuple[int, int], first: int, count: int, device: torch.device) -> Tensor:
    """The words of `count` blocks of Philox's after `first` others: made by numpy, or on another device than a CPU there."""
    import numpy as np
    import torch

    if device.type == "cpu":
        # Of a list numpy would make floating-point numbers.
        made = np.random.Philox(key=np.array(key, np.uint64), counter=np.array([first, 0, 0, 0], np.uint64))
        raw = made.random_raw(count * WORDS_OF_A_BLOCK // 4).astype("<u8", copy=False)
        words = torch.from_numpy(raw.view("<i2").astype(np.int16, copy=False))
    else:
        words = philox(key, count, device, first).view(torch.int16)
    return words.bitwise_xor_(-WORDS // 2)  # from 0 to 65535 as they are made


def noise_of(words: Tensor) -> Tensor:
    """Chance that `words` from -32768 to 32767 stand for, fp32: between 0 and 1."""
    return words.float().add_((WORDS + 1) / 2).div_(WORDS)


def philox(key: tuple[int, int], count: int, device: torch.device, start: int = 0) -> Tensor:
    """`count` blocks of four 64-bit words of Philox4x64-10 after `start` others, as numpy's ``Philox(key)`` gives them.

    They are int64, flat.
    """
    import torch

    # numpy raises the counter before it makes a block.
    first = torch.arange(start + 1, start + count + 1, device=device)
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
