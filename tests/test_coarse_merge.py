"""Merges into coarse storages, whatever the update: one that adds, and one that depends on W."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from synthetic_storages import Stored, Synthetic, synthetic

from loratool.merging.arithmetic import ExactUnmerge, Merge
from loratool.merging.plan import PlannedUpdate, Target
from loratool.updates.low_rank import LoadedLowRank

OUTPUTS, INPUTS, RANK = 192, 160, 4


@dataclass(frozen=True)
class Adds:
    """``B A``, made of numbers that are at hand."""

    b: torch.Tensor
    a: torch.Tensor
    needs_weight = replaces = False
    scalable = True

    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedLowRank:
        return LoadedLowRank(self.a, self.b, weight, transposed)


@dataclass(frozen=True)
class Scales:
    """``diag(m) (W + B A)``, as of DoRA: what it adds depends on W."""

    b: torch.Tensor
    a: torch.Tensor
    m: torch.Tensor
    needs_weight = scalable = True
    replaces = False

    def load(self, *, transposed: bool, weight: float, device: str) -> LoadedScales:
        return LoadedScales(LoadedLowRank(self.a, self.b, weight, transposed), self.m, transposed)


@dataclass(frozen=True)
class LoadedScales:
    product: LoadedLowRank
    m: torch.Tensor
    transposed: bool
    outputs = inputs = None
    keeps = False

    def _magnitudes(self, rows: range) -> torch.Tensor:
        return self.m[None, :] if self.transposed else self.m[rows.start : rows.stop, None]

    def apply(self, block: torch.Tensor, rows: range, scratch: torch.Tensor) -> bytes:
        self.product.apply(block, rows, scratch)
        block.mul_(self._magnitudes(rows))
        return b""

    def revert(self, block: torch.Tensor, rows: range, scratch: torch.Tensor, kept: bytes) -> None:
        block.div_(self._magnitudes(rows))
        self.product.revert(block, rows, scratch)


def update(*, adds: bool, strength: float) -> Any:
    generator = torch.Generator().manual_seed(1)
    b, a = torch.randn(OUTPUTS, RANK, generator=generator), torch.randn(RANK, INPUTS, generator=generator)
    b *= strength / math.sqrt(RANK)
    m = 1 + 0.02 * torch.randn(OUTPUTS, generator=generator)
    return Adds(b, a) if adds else Scales(b, a, m)


def wanted(update: Any, before: torch.Tensor) -> torch.Tensor:
    """W', (outputs, inputs)."""
    after = before + update.b @ update.a
    return update.m[:, None] * after if update.needs_weight else after


STORAGES = {
    "int4": {"levels": "int4", "tiles": "groups", "spread": 0.6},
    "uneven nibbles": {"levels": "uneven-16", "tiles": "groups", "per_byte": 2, "high_first": True, "spread": 0.6},
    "e4m3": {"levels": "e4m3", "tiles": "ragged grid", "signed": False},
    "int8": {"levels": "int8", "tiles": "rows"},
    "int4 turned": {"levels": "int4", "tiles": "index", "turned": True, "zeros": True, "spread": 0.6},
}


@pytest.fixture(params=STORAGES)
def storage(request: pytest.FixtureRequest) -> Synthetic:
    options = STORAGES[request.param]
    rows, columns = (INPUTS, OUTPUTS) if options.get("turned") else (OUTPUTS, INPUTS)
    return synthetic(**options, rows=rows, columns=columns)  # type: ignore[arg-type]


def as_parameter(storage: Synthetic, parts: tuple[torch.Tensor, ...] | None = None) -> torch.Tensor:
    decoded = storage.decoded(parts)
    return decoded.T if storage.weight.turned else decoded


@pytest.mark.parametrize("adds", [True, False], ids=["adds", "depends on W"])
def test_what_is_merged_is_taken_out_bit_for_bit(storage: Synthetic, adds: bool) -> None:
    change = update(adds=adds, strength=0.08 * storage.step())
    target = Target(Stored(storage), (PlannedUpdate(0, "w", change, 1.0),), seed=3)
    parts, frames = storage.parts(), []
    everything = range(storage.weight.rows)
    Merge(target, "cpu", lambda rows, packed: frames.append((rows, packed))).change(everything, parts)
    before, after = as_parameter(storage), as_parameter(storage, parts)
    delta = wanted(change, before) - before
    share = float(((after - before) * delta).double().sum() / delta.double().square().sum())
    assert share == pytest.approx(1, abs=0.08)
    assert not torch.equal(parts[0], storage.content)
    unmerge = ExactUnmerge(target, "cpu", iter(frames))
    (block,) = unmerge.blocks()
    unmerge.change(block, parts)
    assert torch.equal(parts[0], storage.content)


@pytest.mark.parametrize("adds", [True, False], ids=["adds", "depends on W"])
def test_a_calibrated_merge_is_nearer_on_its_inputs_and_taken_out_bit_for_bit(
    storage: Synthetic, adds: bool, tmp_path: Any
) -> None:
    generator, off, frames = np.random.default_rng(2), [], []
    inputs = (
        generator.normal(size=INPUTS) * 2 + generator.normal(size=(200, 5)) @ generator.normal(size=(5, INPUTS))
    ).astype("f4")
    np.save(tmp_path / "inputs.npy", inputs)
    change, everything = update(adds=adds, strength=0.2 * storage.step()), range(storage.weight.rows)
    for file in (None, tmp_path / "inputs.npy"):
        target = Target(Stored(storage), (PlannedUpdate(0, "w", change, 1.0),), seed=3, inputs=file)
        parts = storage.parts()
        frames.clear()
        Merge(target, "cpu", lambda rows, packed: frames.append((rows, packed))).change(everything, parts)
        error = as_parameter(storage, parts) - wanted(change, as_parameter(storage))
        off.append(float((error @ torch.from_numpy(inputs).T).square().sum()))
    assert off[1] < 0.7 * off[0]
    unmerge = ExactUnmerge(target, "cpu", iter(frames))
    (block,) = unmerge.blocks()
    unmerge.change(block, parts)
    assert torch.equal(parts[0], storage.content)
