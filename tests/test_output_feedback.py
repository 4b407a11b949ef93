"""NF4 rounding that makes good what earlier rows are off by, in the directions that an update writes to."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from loratool.checkpoint.header import TensorInfo
from loratool.weights.four_bit import FourBitWeight, QuantState
from loratool.weights.four_bit_codes import LoadedFourBit
from loratool.weights.output_feedback import OutputFeedback
from loratool.weights.rounding import Rounding

ROWS, COLUMNS, RANK = 384, 512, 4


class Merged:
    """A matrix of random numbers with ``B A`` merged into its NF4 codes, in blocks of so many rows."""

    def __init__(self, *, feedback: bool, block_rows: int = ROWS, strength: float = 1e-4,
                 first: float = 1.0) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(5)
        weight = (torch.randn(ROWS, COLUMNS, generator=generator) * 0.02).bfloat16()
        codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
        b, a = torch.randn(ROWS, RANK, generator=generator), torch.randn(RANK, COLUMNS, generator=generator)
        b[:block_rows] *= first
        info = TensorInfo.__new__(TensorInfo)  # the codes are at hand: nothing is read from a file
        stored = FourBitWeight("w", QuantState("nf4", (ROWS, COLUMNS), 64, "float32"), info, {})
        codec = LoadedFourBit(stored, state.absmax.clone())
        rounding = Rounding(7, outputs=OutputFeedback(b) if feedback else None)
        change = b @ a * strength
        self.codes = codes.view(-1).clone()
        errors = []
        for start in range(0, ROWS, block_rows):
            rows = range(start, start + block_rows)
            part = self.codes[start * COLUMNS // 2 : rows.stop * COLUMNS // 2]
            old, new = torch.empty(block_rows, COLUMNS), torch.empty(block_rows, COLUMNS)
            codec.decode(rows, (part,), old)
            codec.encode(rows, change[start : rows.stop].clone(), (part,), rounding)
            codec.decode(rows, (part,), new)
            errors.append(new - old - change[start : rows.stop])
        error = torch.cat(errors)
        basis, _ = torch.linalg.qr(b)
        self.noise = float(error.square().sum() / change.square().sum())
        self.noise_in_outputs = float((basis.T @ error).square().sum() / change.square().sum())
        self.changed = float((self.codes != codes.view(-1)).float().mean())


@pytest.mark.parametrize("block_rows", [ROWS, 96])
def test_the_noise_in_the_directions_of_the_update_is_made_good(block_rows: int) -> None:
    """Whatever the cut into blocks, and neither with more codes moved nor with more noise elsewhere."""
    by_chance = Merged(feedback=False, block_rows=block_rows)
    made_good = Merged(feedback=True, block_rows=block_rows)
    assert by_chance.noise_in_outputs > 0.005
    assert made_good.noise_in_outputs < 0.5 * by_chance.noise_in_outputs
    assert made_good.noise < 1.1 * by_chance.noise
    assert made_good.changed < 1.1 * by_chance.changed


def test_what_a_block_of_a_large_change_is_off_by_is_made_good_by_the_next() -> None:
    """Nothing is passed on within it, only from it."""
    by_chance = Merged(feedback=False, block_rows=96, first=3, strength=2e-4)
    made_good = Merged(feedback=True, block_rows=96, first=3, strength=2e-4)
    assert torch.equal(by_chance.codes[: 48 * COLUMNS], made_good.codes[: 48 * COLUMNS])
    assert made_good.noise_in_outputs < 0.4 * by_chance.noise_in_outputs


def test_equal_merges_give_equal_codes() -> None:
    assert torch.equal(Merged(feedback=True).codes, Merged(feedback=True).codes)


def test_rows_that_nothing_is_added_to_stay() -> None:
    assert Merged(feedback=True, strength=0.0).changed == 0
