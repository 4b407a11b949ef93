"""Several adapters of any kinds merge in the order given: each acts on what those before it made, and all are rounded once."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from kinds import CASES, MODULE, Case, save_case
from tiny_models import as_torch, assert_same_tensors, save_plain_model, stored_tensors

import loratool
from loratool.errors import PlacementError
from loratool.formats.read import read_adapter

NAME = f"{MODULE}.weight"
OUTPUTS, INPUTS = 12, 8
CLOSE = 2e-5
PUT = ("ln_tuning", "trainable_tokens")
"""Kinds that put numbers of their own in the place of W's, so that no other adapter may change the same ones."""

FIRST = [name for name in CASES if name not in PUT]
RING = [*pairwise([*FIRST, FIRST[0]])]
"""Each kind before the next one in the table, and the last before the first."""


def weight_of(seed: int) -> torch.Tensor:
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(seed))


class Made:
    """A base of one matrix, and an adapter of each kind, which is not that of another seed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.weight = folder, weight_of(0)
        self.base = save_plain_model(folder / "base", {NAME: self.weight})

    def adapter(self, case: Case, seed: int) -> Path:
        folder = self.folder / f"{case.name}-{seed}"
        if not folder.exists():
            save_case(folder, case, {MODULE: self.weight}, seed)
        return folder

    def changed(self, case: Case, seed: int, weight: torch.Tensor) -> torch.Tensor:
        """What the adapter makes of a weight that others may have changed, by the oracle."""
        tensors = case.tensors(self.weight, torch.Generator().manual_seed(seed))
        return case.beside(weight, self.weight, tensors) if case.beside else case.wanted(weight, tensors)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize("first", FIRST)
def test_the_second_adapter_acts_on_what_the_first_one_made(first: str, made: Made, tmp_path: Path) -> None:
    for second in FIRST:
        cases = (CASES[first], 1), (CASES[second], 2)
        adapters = [made.adapter(*each) for each in cases]
        merged = loratool.merge(adapters, made.base, out=tmp_path / second).out
        expected = made.weight
        for each in cases:
            expected = made.changed(*each, expected)
        found = as_torch(stored_tensors(merged)[NAME])
        assert torch.allclose(found.double(), expected, atol=CLOSE), (first, second)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", PUT)
def test_numbers_put_in_the_place_of_others_are_not_changed_by_a_second_adapter(
    kind: str, order: int, made: Made, tmp_path: Path
) -> None:
    adapters = [made.adapter(CASES[kind], 1), made.adapter(CASES[FIRST[0]], 2)]
    with pytest.raises(PlacementError, match=f"'{kind}-1'.*another update"):
        loratool.merge(adapters[::order], made.base, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("first", "second"), RING)
def test_both_are_taken_out_bit_for_bit(first: str, second: str, made: Made, tmp_path: Path) -> None:
    adapters = [made.adapter(CASES[first], 1), made.adapter(CASES[second], 2)]
    merged = loratool.merge(adapters, made.base, out=tmp_path / "merged", undo=True).out
    loratool.verify(merged)
    back = loratool.unmerge(merged, out=tmp_path / "back").out
    assert_same_tensors(stored_tensors(back), stored_tensors(made.base))


@pytest.mark.parametrize(("first", "second"), RING)
def test_each_has_a_weight_of_its_own(first: str, second: str, made: Made, tmp_path: Path) -> None:
    """A kind that adds to W adds so many times as much; others have tests of their own for their weight."""
    cases = [(CASES[first], 1, 0.5), (CASES[second], 2, -2.0)]
    weighted, expected = [], made.weight.double()
    for case, seed, weight in cases:
        folder = made.adapter(case, seed)
        update = read_adapter(folder).changes[NAME]
        weight = weight if update.scalable and not update.needs_weight else 1.0
        weighted.append((folder, weight))
        expected = expected + weight * (made.changed(case, seed, expected) - expected)
    merged = loratool.merge(weighted, made.base, out=tmp_path / "merged").out
    assert torch.allclose(as_torch(stored_tensors(merged)[NAME]).double(), expected, atol=CLOSE)
