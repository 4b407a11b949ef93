"""NF4 rounding that compensates what earlier rows are off by, in the directions that an update writes to."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from test_nf4 import matrix, parts_of
from tiny_models import save_plain_model

from loratool.weights.coarse.output_feedback import OutputFeedback
from loratool.weights.rounding import Rounding

ROWS, COLUMNS, RANK = 384, 512, 4


class Merged:
    """A matrix of random numbers with ``B A`` merged into its NF4 codes, in blocks of so many rows."""

    def __init__(self, folder: Path, *, feedback: bool, block_rows: int = ROWS, strength: float = 1e-4,
                 first: float = 1.0) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(5)
        weight = (torch.randn(ROWS, COLUMNS, generator=generator) * 0.02).bfloat16()
        codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
        parts = {f"m.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        stored = matrix(save_plain_model(folder / f"{feedback}-{block_rows}", {"m.weight": codes, **parts}))
        b, a = torch.randn(ROWS, RANK, generator=generator), torch.randn(RANK, COLUMNS, generator=generator)
        b[:block_rows] *= first
        codec, rounding = stored.load("cpu"), Rounding(7, outputs=OutputFeedback(b) if feedback else None)
        change = b @ a * strength
        after, errors = [], []
        for start in range(0, ROWS, block_rows):
            rows = range(start, start + block_rows)
            (part,) = parts_of(stored, rows)
            old, new = torch.empty(block_rows, COLUMNS), torch.empty(block_rows, COLUMNS)
            codec.decode(rows, (part,), old)
            codec.encode(rows, change[start : rows.stop].clone(), (part,), rounding)
            codec.decode(rows, (part,), new)
            errors.append(new - old - change[start : rows.stop])
            after.append(part)
        error, self.codes = torch.cat(errors), torch.cat(after)
        basis, _ = torch.linalg.qr(b)
        self.noise = float(error.square().sum() / change.square().sum())
        self.noise_in_outputs = float((basis.T @ error).square().sum() / change.square().sum())
        self.changed = float((self.codes != codes.view(-1)).float().mean())


@pytest.mark.parametrize("block_rows", [ROWS, 96])
def test_the_noise_in_the_directions_of_the_update_is_made_good(tmp_path: Path, block_rows: int) -> None:
    """Whatever the cut into blocks, and neither with more codes moved nor with more noise elsewhere."""
    by_chance = Merged(tmp_path, feedback=False, block_rows=block_rows)
    made_good = Merged(tmp_path, feedback=True, block_rows=block_rows)
    assert by_chance.noise_in_outputs > 0.005
    assert made_good.noise_in_outputs < 0.5 * by_chance.noise_in_outputs
    assert made_good.noise < 1.1 * by_chance.noise
    assert made_good.changed < 1.1 * by_chance.changed


def test_what_a_block_of_a_large_change_is_off_by_is_made_good_by_the_next(tmp_path: Path) -> None:
    """Nothing is passed on within it, only from it."""
    by_chance = Merged(tmp_path, feedback=False, block_rows=96, first=3, strength=2e-4)
    made_good = Merged(tmp_path, feedback=True, block_rows=96, first=3, strength=2e-4)
    assert torch.equal(by_chance.codes[: 48 * COLUMNS], made_good.codes[: 48 * COLUMNS])
    assert made_good.noise_in_outputs < 0.4 * by_chance.noise_in_outputs


def test_equal_merges_give_equal_codes(tmp_path: Path) -> None:
    one, other = (Merged(tmp_path / name, feedback=True).codes for name in ("one", "other"))
    assert torch.equal(one, other)


def test_rows_that_nothing_is_added_to_stay(tmp_path: Path) -> None:
    assert Merged(tmp_path, feedback=True, strength=0.0).changed == 0
