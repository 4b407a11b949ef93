"""Random numbers for stochastic rounding: for the same seed, the same on every machine and device."""

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
"""Number of different words of 16 bits."""

WORDS_OF_A_BLOCK: Final = 16
"""Words of 16 bits in one block of Philox4x64."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """How to round: stochastic if the storage is coarse, error-compensated by calibration inputs or by output directions.

    Attributes:
        seed: seed of the random numbers, below 2**64. It is derived from what is merged, so equal merges give equal bytes.
        feedback: error compensation between inputs, or a function that makes it for some inputs. It takes precedence.
        outputs: error compensation between outputs, which is used where the change is small.
        all_carry: whether each code must carry its own change, because the change depends on the weights.

    The seed alone does not undo error compensation; an undo file holds the rest.
    """

    seed: int
    feedback: Feedback | Callable[[range], Feedback] | None = None
    outputs: OutputFeedback | None = None
    all_carry: bool = False

    def feedback_for(self, inputs: range) -> Feedback | None:
        """Return the error compensation for a block with these inputs, or None."""
        return self.feedback(inputs) if callable(self.feedback) else self.feedback

    def words(self, rows: range, count: int, device: torch.device) -> Tensor:
        """Return `count` random words, int16, flat, for a block that begins with row ``rows.start`` (see `noise_of`).

        They come from Philox4x64-10 with the seed and the row as its key.
        """
        return _words((self.seed, rows.start), 0, -(-count // WORDS_OF_A_BLOCK), device)[:count]

    def words_of_rows(self, rows: range, columns: int, device: torch.device) -> Tensor:
        """Return random words, int16, (rows, columns), that do not depend on how rows are cut into blocks.

        They come from Philox4x64-10 with the seed as its key. Each row begins with a new block of Philox4x64.
        """
        blocks = -(-columns // WORDS_OF_A_BLOCK)
        words = _words((self.seed, 0), rows.start * blocks, len(rows) * blocks, device)
        return words.view(len(rows), -1)[:, :columns]


def _words(key: tuple[int, int], first: int, count: int, device: torch.device) -> Tensor:
    """Return the words of `count` blocks of Philox4x64 after the first `first` ones. NumPy makes them on a CPU."""
    import numpy as np
    import torch

    if device.type == "cpu":
        # NumPy would convert a list to floating-point numbers.
        made = np.random.Philox(key=np.array(key, np.uint64), counter=np.array([first, 0, 0, 0], np.uint64))
        raw = made.random_raw(count * WORDS_OF_A_BLOCK // 4).astype("<u8", copy=False)
        words = torch.from_numpy(raw.view("<i2").astype(np.int16, copy=False))
    else:
        words = philox(key, count, device, first).view(torch.int16)
    return words.bitwise_xor_(-WORDS // 2)  # maps 0..65535, read as int16, to -32768..32767


def noise_of(words: Tensor) -> Tensor:
    """Return the random numbers between 0 and 1, fp32, that `words` from -32768 to 32767 stand for."""
    return words.float().add_((WORDS + 1) / 2).div_(WORDS)


def philox(key: tuple[int, int], count: int, device: torch.device, start: int = 0) -> Tensor:
    """Return `count` blocks of four 64-bit words of Philox4x64-10 after the first `start` ones: int64, flat.

    They equal those of NumPy's ``Philox(key)``.
    """
    import torch

    # NumPy increments the counter before it makes a block.
    first = torch.arange(start + 1, start + count + 1, device=device)
    words = [first, *(torch.zeros_like(first) for _ in range(3))]
    for turn in range(ROUNDS):
        keys = [_signed(word + turn * weyl) for word, weyl in zip(key, WEYL, strict=True)]
        high_0, low_0 = _product(words[0], MULTIPLIERS[0])
        high_1, low_1 = _product(words[2], MULTIPLIERS[1])
        words = [high_1 ^ words[1] ^ keys[0], low_1, high_0 ^ words[3] ^ keys[1], low_0]
    return torch.stack(words, 1).view(-1)


def _product(numbers: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """Return the upper and lower 64 bits of a product of unsigned 64-bit numbers. torch multiplies modulo 2**64."""
    low, high = numbers & HALF, (numbers >> 32) & HALF
    by_low, by_high = by & HALF, by >> 32
    # The product of two halves can exceed 2**63. torch's signed numbers then wrap, with the right bits.
    middle = high * by_low + _upper(low * by_low)
    cross = low * by_high + (middle & HALF)
    return high * by_high + _upper(middle) + _upper(cross), numbers * _signed(by)


def _upper(numbers: Tensor) -> Tensor:
    """Return the upper 32 of 64 bits as an unsigned number."""
    return (numbers >> 32) & HALF


def _signed(number: int) -> int:
    """Return the signed 64-bit number with the last 64 bits of `number`."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number
